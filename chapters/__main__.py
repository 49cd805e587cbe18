"""``python -m chapters``: the way through the course; ``--help`` lists the commands."""

import sys

from chapters.machine.cli import main

if __name__ == "__main__":
    sys.exit(main())
