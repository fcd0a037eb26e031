"""`fusedres explain`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..measured import encoded
from . import device, factory, models
from .arguments import Answer, Parser, Wrong

if TYPE_CHECKING:
    from ..explanation import Call


def options(parser: Parser, rest: Sequence[str]) -> None:
    factory.add(parser, "(module, x), or a module and all its arguments")
    models.add_stack(parser)


def run(options: argparse.Namespace) -> Answer:
    found: Any
    if options.factory:
        found = models.given_alone(options)
        if not (isinstance(found, tuple) and len(found) > 1 and callable(found[0])):
            raise Wrong(f"module:factory must return (module, x), got {type(found).__name__}")
    else:
        found = models.stack(options, device.chosen(options))
    with factory.run(options, "explaining"):
        calls = models.explained(*found)
    print(calls)
    return Answer(0, {"calls": [_call(call) for call in calls]})


def _call(call: Call) -> dict[str, Any]:
    layers = getattr(call.spec, "layers", None)
    return {
        "name": call.name,
        "M": call.M,
        "N": call.N,
        "K": call.K,
        "dtype": str(call.dtype).removeprefix("torch."),
        "layers": len(layers) if layers else 1,
        "backend": call.backend,
        "because": call.choice.because,
        "way": call.way and call.way.name,
        "way_because": call.way and call.way.because,
        "tiles": encoded(call.tiles),
        "tiles_because": call.because and call.because._asdict(),
        "in_training": call.in_training and str(call.in_training),
        "keeps": call.keeps,
        "threads": call.threads,
    }
