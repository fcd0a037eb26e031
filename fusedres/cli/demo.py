"""`fusedres demo`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from ..studies.values import Integer
from . import device, folder
from .arguments import Answer, Parser, Wrong, add_device, add_out, add_seed


def options(parser: Parser, rest: Sequence[str]) -> None:
    add_out(parser, "fusedres-demo", "pictures and data")
    parser.add_argument("--epochs", metavar="N", type=Integer(1), default=5, help="of training [%(default)s]")
    add_seed(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> Answer:
    chosen = device.chosen(options)
    if chosen.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        from .. import native

        device.set_interpreter(native.missing() is not None, options.arguments)

    from ..studies import demo

    with folder.made(options.out):
        try:
            found = demo.run(options.out, options.epochs, options.seed, chosen)
        except ImportError as error:
            raise Wrong(str(error)) from error
        except BrokenPipeError:  # of who reads what is printed
            raise
        except OSError as error:
            raise Wrong(f"--out cannot be written: {error}") from error
    return Answer(0 if found["agrees"] else 1, found)
