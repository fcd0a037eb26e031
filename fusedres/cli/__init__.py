"""The command line, `python -m fusedres COMMAND`: a file per command, which imports torch no sooner than it runs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType

from . import streams
from .arguments import Answer, Parser, Wrong, add_json, one_of

COMMANDS = {
    "demo": "fused and eager gradients side by side, and a classifier trained both ways",
    "compare": "gradients of a fused network, or of a module of yours, against eager ones: a verdict per layer",
    "study": "a write-up's claims, measured: a table, pictures, whether they hold",
    "explain": "what would run each fused call of a network, or of a module of yours, and why",
    "bench": "a short benchmark on this machine, fused against eager",
    "env": "versions, GPU, compilers, caches, and what would run where",
    "check": "a self-test on this machine, of a minute at most",
    "build": "build the CPU kernels, which else the first call does",
}


CODES = """\
exit codes: 0 right; 1 a check failed, gradients differ, a claim does not hold; 2 bad use, in one line; 130 Ctrl-C;
141 what reads the output has gone"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default the process's own; its exit code, one of CODES."""
    streams.spell_out()
    try:
        with streams.no_interrupt_lost():
            try:
                return _outcome(sys.argv[1:] if argv is None else list(argv))
            finally:
                streams.flush()
    except OSError as error:
        if not streams.abandon():
            raise  # of a file, say
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"fusedres: what is printed cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fusedres: interrupted", file=sys.stderr)
        return 130


def _outcome(arguments: list[str]) -> int:
    """0, 1, or 2 where what is wrong has been said."""
    program = "fusedres"
    try:
        if not arguments or arguments[0].startswith("-"):
            _parser().parse_args(arguments)  # --help and --version end here
        program = f"fusedres {one_of(*COMMANDS).named('command', arguments[0])}"
        return _run(program, arguments)
    except Wrong as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    """Of a line that begins with no command."""
    from .. import __version__

    commands = "\n".join(f"  {name:8} {does}" for name, does in COMMANDS.items())
    parser = Parser(
        "fusedres", f"Fused residual layers for PyTorch. Commands, each with --help and --json:\n\n{commands}"
    )
    parser.epilog = CODES
    parser.add_argument("--version", action="version", version=f"fusedres {__version__}")
    parser.add_argument("command", help="one of the above, followed by its options")
    return parser


def _run(program: str, arguments: list[str]) -> int:
    name, rest = arguments[0], arguments[1:]
    command = import_module(f".{name}", __package__)
    parser = Parser(program, f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.")
    add_json(parser)
    command.options(parser, rest)
    options = parser.parse_args(rest)
    options.arguments = arguments  # to start the process anew with
    with streams.kept_for_json() if options.json else nullcontext():
        code, document = _answer(command, options)
    if options.json:
        print(json.dumps(json.loads(json.dumps(document), parse_constant=lambda _: None)))  # JSON knows no infinity
    return code


def _answer(command: ModuleType, options: argparse.Namespace) -> Answer:
    try:
        return command.run(options)
    except (MemoryError, RuntimeError) as error:  # torch has a type of its own for a GPU alone
        if not isinstance(error, MemoryError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        raise Wrong(f"there is not enough memory for this: {error}") from error
