"""`fusedres compare`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from . import device, models
from .arguments import Answer, Parser, Wrong, add_out


def options(parser: Parser, rest: Sequence[str]) -> None:
    models.add_factory(parser, "(fused, eager, x), (fused, eager, x, target) or a dict of compare_gradients' arguments")
    models.add_stack(parser)
    add_out(parser, None, "a picture and the data")


def run(options: argparse.Namespace) -> Answer:
    import torch

    from .. import __version__
    from ..gradients import compare_gradients, picture

    if options.factory:
        given = _arguments(models.from_factory(options))
    else:
        fused, x = models.stack(options, device.chosen(options))
        given = {"fused": fused, "eager": fused.to_eager(), "x": x}
    try:
        if options.out:
            picture.new_figure(1, 1)  # or say now what is missing
        comparison = compare_gradients(**given)
    except (ImportError, TypeError, ValueError) as error:
        raise Wrong(str(error)) from error
    calls = models.ran(models.explained(given["fused"], given["x"]))
    print(comparison.table())
    print(models.ran_text(calls))
    facts = {"fusedres": __version__, "torch": torch.__version__, "fused_calls": calls}
    document = comparison.to_dict() | facts
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        paths = [options.out / "compare.png", options.out / "compare.json"]
        comparison.plot(paths[0])
        paths[1].write_text(json.dumps(document, allow_nan=False) + "\n")
        document["written"] = [str(path) for path in paths]
        print("Written:", *paths)
    return Answer(comparison.exit_code, document)


def _arguments(found: Any) -> dict[str, Any]:
    """A factory's answer as arguments of compare_gradients."""
    names = ("fused", "eager", "x", "target", "loss_fn")
    if isinstance(found, tuple) and len(found) in (3, 4):
        return dict(zip(names, found, strict=False))
    if isinstance(found, dict) and {"fused", "eager", "x"} <= set(found) <= set(names):
        return found
    got = f"a dict of {', '.join(map(str, found))}" if isinstance(found, dict) else type(found).__name__
    got += f" of {len(found)}" if isinstance(found, tuple) else ""
    raise Wrong(
        "module:factory must return (fused, eager, x), (fused, eager, x, target) or a dict of fused, eager, x, target, "
        f"loss_fn, got {got}"
    )
