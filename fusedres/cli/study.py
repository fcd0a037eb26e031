"""`fusedres study NAME`: a module of fusedres.studies with options(parser) and run(options, device) -> Report."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from . import device
from .arguments import Answer, Integer, Parser, Wrong, add_device, add_out, add_seed, one_of

STUDIES = {"vanish": "vanish", "gate": "gate", "lambda": "skip_scale", "shortcut": "shortcut", "depth": "depth"}
FOLDER = Path(__file__).parent.parent / "studies"


def options(parser: Parser, rest: Sequence[str]) -> None:
    """The study's own options are known once it is: it may set other defaults for those that all have."""
    is_help = bool({"-h", "--help"} & set(rest)) and rest[0].startswith("-")
    name = "" if is_help else one_of(*STUDIES).named("NAME, the first argument,", rest[0] if rest else "")
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(STUDIES)}")
    add_out(parser, "fusedres-study", "pictures and data")
    add_seed(parser)
    parser.add_argument("--seeds", metavar="N", type=Integer(1), default=3, help="runs of each [%(default)s]")
    add_device(parser)
    if is_help:
        parser.description = f"{parser.description}\n\n" + "\n".join(map(_line, STUDIES))
    else:
        study = _study(name)
        parser.prog = f"{parser.prog} {name}"
        parser.description = (study.__doc__ or "").strip()
        study.options(parser)


def run(options: argparse.Namespace) -> Answer:
    study, where = _study(options.name), device.chosen(options)
    try:
        report = study.run(options, where)
        print(report.text())
        written = [str(path) for path in report.write(options.out)]
    except ImportError as error:
        raise Wrong(str(error)) from error
    print("\nWritten:", *written)
    return Answer(0 if report.holds else 1, report.to_dict() | {"written": written})


def _study(name: str) -> ModuleType:
    try:
        return import_module(f"fusedres.studies.{STUDIES[name]}")
    except ImportError as error:
        raise Wrong(f"{name} does not import: {error}") from error


def _line(name: str) -> str:
    """The first line of a study's docstring, read without importing it."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{STUDIES[name]}.py").read_text())) or ""
    return f"  {name:9} {text.splitlines()[0] if text else ''}"
