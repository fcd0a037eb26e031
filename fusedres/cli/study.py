"""`fusedres study NAME`: a module of fusedres.studies with options(parser) and run(options, device) -> Report."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ..studies.values import Integer, NothingToMeasure
from . import device, folder
from .arguments import Answer, Parser, Wrong, add_device, add_json, add_out, add_seed, one_of

STUDIES = {"vanish": "vanish", "gate": "gate", "lambda": "skip_scale", "shortcut": "shortcut", "depth": "depth"}
FOLDER = Path(__file__).parent.parent / "studies"


def options(parser: Parser, rest: Sequence[str]) -> None:
    """The study's own options are known once it is: it may set other defaults for those that all have."""
    name = _name(rest)
    _add_common(parser)
    if name:
        parser.add_argument("name", metavar="NAME", help=argparse.SUPPRESS)  # usage begins with it
        study = _study(name)
        parser.prog = f"{parser.prog} {name}"
        parser.description = (study.__doc__ or "").strip()
        study.options(parser)
    else:
        parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(STUDIES)}")
        parser.description = f"{parser.description}\n\n" + "\n".join(map(_line, STUDIES))


def run(options: argparse.Namespace) -> Answer:
    study, where = _study(options.name), device.chosen(options)
    with folder.made(options.out):
        try:
            report = study.run(options, where)
        except (ImportError, NothingToMeasure) as error:
            raise Wrong(str(error)) from error
        with folder.then_printed(report.text()):
            written = [str(path) for path in report.write(options.out)]
    print("\nWritten:", *written)
    return Answer(0 if report.holds else 1, report.to_dict() | {"written": written})


def _add_common(parser: Parser) -> None:
    """The options that all studies have."""
    add_out(parser, "fusedres-study", "pictures and data")
    add_seed(parser)
    parser.add_argument("--seeds", metavar="N", type=Integer(1, 10_000), default=3, help="runs of each [%(default)s]")
    add_device(parser)


def _name(rest: Sequence[str]) -> str:
    """The first word that is no option that all studies have, nor the value of one; none where help is asked for."""
    parser = Parser("", "")
    add_json(parser)
    _add_common(parser)
    no_help = [word for word in rest if word not in ("-h", "--help")]
    words = parser.parse_known_args(no_help)[1]
    if not words and len(no_help) < len(rest):
        return ""
    return one_of(*STUDIES).named("NAME, ahead of a study's own options,", words[0] if words else "")


def _study(name: str) -> ModuleType:
    try:
        return import_module(f"fusedres.studies.{STUDIES[name]}")
    except ImportError as error:
        raise Wrong(f"{name} does not import: {error}") from error


def _line(name: str) -> str:
    """The first line of a study's docstring, read without importing it."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{STUDIES[name]}.py").read_text(encoding="utf-8"))) or ""
    return f"  {name:9} {text.splitlines()[0] if text else ''}"
