"""The command line, `python -m fusedres COMMAND`: a file per command, which imports torch no sooner than it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module

from .arguments import Parser, Wrong, one_of

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default the process's own; 0 right, 1 a check failed, 2 bad use."""
    arguments = sys.argv[1:] if argv is None else list(argv)
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
    parser.add_argument("--version", action="version", version=f"fusedres {__version__}")
    parser.add_argument("command", help="one of the above, followed by its options")
    return parser


def _run(program: str, arguments: list[str]) -> int:
    name, rest = arguments[0], arguments[1:]
    command = import_module(f".{name}", __package__)
    parser = Parser(program, f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    command.options(parser, rest)
    options = parser.parse_args(rest)
    options.arguments = arguments  # to start the process anew with
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        code, document = command.run(options)
    if options.json:
        print(json.dumps(json.loads(json.dumps(document), parse_constant=lambda _: None)))  # JSON knows no infinity
    return code
