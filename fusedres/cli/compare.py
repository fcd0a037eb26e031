"""`fusedres compare`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import device, factory, folder, models
from .arguments import Answer, Parser, Wrong, add_out

if TYPE_CHECKING:
    from ..gradients import GradientComparison


def options(parser: Parser, rest: Sequence[str]) -> None:
    factory.add(parser, "(fused, eager, x), (fused, eager, x, target) or a dict of compare_gradients' arguments")
    models.add_stack(parser)
    add_out(parser, None, "a picture and the data")


def run(options: argparse.Namespace) -> Answer:
    if not options.out:
        return _compared(options)
    from ..gradients import picture

    try:
        picture.new_figure(1, 1)  # or say now what is missing
    except ImportError as error:
        raise Wrong(str(error)) from error
    with folder.made(options.out):
        return _compared(options)


def _compared(options: argparse.Namespace) -> Answer:
    import torch

    from .. import __version__
    from ..gradients import compare_gradients

    if options.factory:
        given = _arguments(models.given_alone(options))
    else:
        fused, x = models.stack(options, device.chosen(options))
        given = {"fused": fused, "eager": fused.to_eager(), "x": x}
    with factory.run(options, "comparing"):
        comparison = compare_gradients(**given)
        calls = models.ran(models.explained(given["fused"], given["x"]))
    facts = {"fusedres": __version__, "torch": torch.__version__, "fused_calls": calls}
    document = comparison.to_dict() | facts
    with folder.then_printed(f"{comparison.table()}\n{models.ran_text(calls)}"):
        if options.out:
            document["written"] = _write(comparison, document, options.out)
    if options.out:
        print("Written:", *document["written"])
    return Answer(comparison.exit_code, document)


def _write(comparison: GradientComparison, document: dict[str, Any], out: Path) -> list[str]:
    """The picture and the data; their paths."""
    paths = [out / "compare.png", out / "compare.json"]
    comparison.plot(paths[0])
    paths[1].write_text(json.dumps(document, allow_nan=False) + "\n")
    return [str(path) for path in paths]


def _arguments(found: Any) -> dict[str, Any]:
    """A factory's answer as arguments of compare_gradients."""
    import torch

    names = ("fused", "eager", "x", "target", "loss_fn")
    if isinstance(found, tuple) and len(found) in (3, 4):
        given = dict(zip(names, found, strict=False))
    elif isinstance(found, dict) and {"fused", "eager", "x"} <= set(found) <= set(names):
        given = found
    else:
        got = f"a dict of {', '.join(map(str, found))}" if isinstance(found, dict) else type(found).__name__
        got += f" of {len(found)}" if isinstance(found, tuple) else ""
        raise Wrong(
            "module:factory must return (fused, eager, x), (fused, eager, x, target) or a dict of fused, eager, x, "
            f"target, loss_fn, got {got}"
        )
    x = given["x"]
    if isinstance(x, torch.Tensor) and x.numel() == 0:
        raise Wrong(f"x must hold numbers, for without them every gradient is 0 and agrees, got shape {list(x.shape)}")
    return given
