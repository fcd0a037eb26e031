"""A callable of the user's that says what to run, and whatever goes wrong in code of the user's, in one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from .arguments import Parser, Wrong

FORM = "must name a module and a callable in it, as in models:twins or of.yours:twins"


def add(parser: Parser, returns: str) -> None:
    parser.add_argument(
        "factory", metavar="module:factory", nargs="?", help=f"a callable of yours that returns {returns}"
    )


def called(options: argparse.Namespace) -> Any:
    """What the callable returns, under --seed; Wrong, in one line, for whatever goes wrong on the way."""
    import torch

    name, _, attribute = options.factory.partition(":")
    if not all(name.split(".")) or os.sep in name or not attribute.isidentifier():
        raise Wrong(f"module:factory {FORM}, got {options.factory}")
    factory = getattr(module := _module(name), attribute, None)
    if not callable(factory):
        has = "is not callable" if hasattr(module, attribute) else "is not there"
        raise Wrong(f"module:factory must name a callable in {name}: {attribute} {has}")
    torch.manual_seed(options.seed)
    with guarded(f"{options.factory}() raised"):
        return factory()


def _module(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    with guarded(f"module {name} does not import:"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and f"{name}.".startswith(f"{error.name}."):
                raise Wrong(f"module:factory must name a module, and there is no {name} here or installed") from None
            raise


def run(options: argparse.Namespace, doing: str) -> AbstractContextManager[None]:
    """Around what runs a module: where it is the user's, what is raised is said; what our own raises is a bug."""
    return guarded(f"{doing} raised") if options.factory else nullcontext()


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Makes Wrong of all that is raised inside, of the end of the process too, and leaves Ctrl-C."""
    try:
        yield
    except (KeyboardInterrupt, Wrong):
        raise
    except BaseException as error:
        raise Wrong(_told(what, error)) from error


def _told(what: str, error: BaseException) -> str:
    """The error in one line, and the last place of the user's that it came through, or else the last of all."""
    import torch

    said = (str(error).splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    ours, *others = (
        os.path.join(Path(one).parent, "") for one in (Path(__file__).parent, torch.__file__, importlib.__file__)
    )
    theirs = [frame for frame in frames if not frame.filename.startswith((ours, *others, "<frozen"))]
    if isinstance(error, TypeError | ValueError) and frames[-1].filename.startswith(ours) and not theirs:
        return said  # of our own checks, which name the argument
    if isinstance(error, SyntaxError):
        return f"{what} {type(error).__name__}: {said}"  # it names its place
    frame = (theirs or frames)[-1]
    return f"{what} {type(error).__name__}: {said} ({frame.filename}:{frame.lineno})"
