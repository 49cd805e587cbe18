"""Imported before anything large: lets this Python keep bytecode where none is kept by itself.

Dozens of Pythons run in a session, and with PYTHONDONTWRITEBYTECODE set each would compile torch
anew. So this one keeps what it compiles beside pytest's cache, and those that it starts read it.
"""

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / ".pytest_cache" / "bytecode"

if sys.dont_write_bytecode and sys.pycache_prefix is None:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(FOLDER)
