"""The command line: ``minivllm`` alone runs the demo."""

import argparse
import errno
import os
import select
import sys
from collections.abc import Sequence

from minivllm.benchmarks.commands import OWN_FLAGS, add_benchmarks, run_with_own_flags
from minivllm.cli_flags import (
    Parser,
    add_engine_flags,
    add_generation_flags,
    engine_settings,
    positive,
)

# What a user can do something about: a file that is not there, or cannot be written.
FILE_ERRORS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    2: a user's mistake, or a file that cannot be read or written, told in one line. 130:
    interrupted. 141: whoever read the output has gone.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "demo")
    try:
        code = 0
        if arguments[0] == "bench" and arguments[1:2] and arguments[1] in OWN_FLAGS:
            code = run_with_own_flags(arguments[1:])
        else:
            options = parser.parse_args(arguments)
            options.run(options)
        # Here, and not when Python ends, so that a pipe that nobody reads is noticed below.
        sys.stdout.flush()
        return code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            # As of "minivllm | head". Python flushes once more at its end, which must not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        if error.errno not in FILE_ERRORS:
            raise
        print(f"minivllm: error: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"minivllm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minivllm: interrupted", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose other end has been closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLERR)
    except (AttributeError, OSError):
        return False  # a system without poll, or an output that is no file
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _demo(options: argparse.Namespace) -> None:
    # Here, so that --help and a mistyped flag do not wait for PyTorch.
    from minivllm.demo import run_demo

    run_demo(
        engine_settings(options),
        repeat=options.repeat,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        as_json=options.json,
    )


def _chat(options: argparse.Namespace) -> None:
    from minivllm.chat import run_chat

    run_chat(
        engine_settings(options),
        options.question,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="minivllm",
        description="A small, fast LLM inference engine. Without a command it runs the demo.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="answer 60 chat prompts and report how fast")
    demo.add_argument("--repeat", type=positive, default=30, help="how often each prompt runs (30)")
    add_generation_flags(demo)
    demo.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_engine_flags(demo)
    demo.set_defaults(run=_demo)

    chat = commands.add_parser("chat", help="ask one question, or talk")
    chat.add_argument("question", nargs="?", help="without one, questions are read line by line")
    add_generation_flags(chat)
    add_engine_flags(chat)
    chat.set_defaults(run=_chat)

    bench = commands.add_parser("bench", help="measure: see minivllm bench --help")
    benches = bench.add_subparsers(required=True, metavar="benchmark")
    add_benchmarks(benches)
    return parser


if __name__ == "__main__":
    sys.exit(main())
