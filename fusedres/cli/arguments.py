"""Arguments of commands: their parser, which says in one line what is wrong, and the types that values have."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..studies.values import Integer


class Wrong(Exception):
    """Bad use, in one line, the first: what was expected, from where, what came."""

    def __str__(self) -> str:
        return (super().__str__().splitlines() or [""])[0]


class Answer(NamedTuple):
    """What a command returns: its exit code, and what it has to say as JSON."""

    code: int
    document: dict[str, Any]


class Parser(argparse.ArgumentParser):
    """Takes whole names of options only, and raises Wrong where argparse prints its usage and ends the process."""

    def __init__(self, program: str, description: str) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(program, description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        said = re.sub(r"^argument (\S+): ", r"\1 ", message)
        raise Wrong(re.sub(r"invalid (\w+) value: ", r"must be of type \1, got ", said))


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    choices: tuple[str, ...]

    def __call__(self, text: str) -> str:
        if text not in self.choices:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(self.choices)}, got {text!r}")
        return text

    def named(self, name: str, text: str) -> str:
        """The word, where no parser reads it."""
        try:
            return self(text)
        except argparse.ArgumentTypeError as error:
            raise Wrong(f"{name} {error}") from None


def one_of(*choices: str) -> Choice:
    return Choice(choices)


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")


def add_device(parser: Parser, default: str = "a GPU where there is one") -> None:
    parser.add_argument("--device", metavar="cpu|cuda", type=one_of("cpu", "cuda"), help=f"where to run [{default}]")


def add_seed(parser: Parser) -> None:
    parser.add_argument("--seed", metavar="S", type=Integer(0), default=0, help="of every draw [%(default)s]")


def add_out(parser: Parser, default: str | None, what: str) -> None:
    shown = f"folder for {what} [{default or 'nothing is written'}]"
    parser.add_argument("--out", metavar="DIR", type=Path, default=default and Path(default), help=shown)
