"""What compare, explain and bench run: a stack by its sizes and options, or what a callable of the user's returns."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..studies.values import Integer, Joined, Widths
from . import factory
from .arguments import Parser, Wrong, add_device, add_seed, one_of

if TYPE_CHECKING:
    import torch

    from ..explanation import Explanation
    from ..stack import FusedResidualStack

ACTIVATIONS = one_of("gelu", "gelu_tanh", "relu", "silu", "tanh", "sin", "none")
SKIPS = one_of("auto", "identity", "projection", "none")
DTYPES = one_of("float32", "float64", "bfloat16", "float16")
DEFAULTS: dict[str, Any] = {
    "sizes": [3] * 13 + [1],
    "skip": "auto",
    "activation": "gelu",
    "order": "pre",
    "rows": 64,
    "dtype": "float32",
}


def add_stack(parser: Parser, **defaults: Any) -> None:
    """Options of a stack; what is not given stays None, so that it can be told from what is."""
    found = DEFAULTS | defaults
    parser.set_defaults(stack_defaults=found)

    def add(name: str, metavar: str, type: Callable[[str], Any], what: str, **more: Any) -> None:
        parser.add_argument(f"--{name}", metavar=metavar, type=type, help=what, **more)

    shown = " ".join(map(str, found["sizes"]))
    add("sizes", "D", Widths(), f"widths d₀ … d_L, by spaces or commas [{shown}]", nargs="+", action=Joined)
    add("skip", "KIND", SKIPS, f"{', '.join(SKIPS.choices)} [{found['skip']}]")
    parser.add_argument("--no-skips", dest="skip", action="store_const", const="none", help="--skip none")
    add("activation", "PHI", ACTIVATIONS, f"{', '.join(ACTIVATIONS.choices)} [{found['activation']}]")
    add("order", "pre|post", one_of("pre", "post"), f"the activation before the addition or after [{found['order']}]")
    add("rows", "M", Integer(1), f"of x, which is drawn from standard normals [{found['rows']}]")
    add("dtype", "DTYPE", DTYPES, f"{', '.join(DTYPES.choices)} [{found['dtype']}]")
    add_seed(parser)
    add_device(parser)


def stack(options: argparse.Namespace, device: torch.device) -> tuple[FusedResidualStack, torch.Tensor]:
    """The stack that the options describe, and x [rows, d₀]."""
    import torch

    from ..stack import FusedResidualStack

    given = {name: getattr(options, name) for name in DEFAULTS}
    chosen = options.stack_defaults | {name: value for name, value in given.items() if value is not None}
    widths = chosen["sizes"]
    dtype = getattr(torch, chosen["dtype"])
    _require_memory(chosen["rows"] * widths[0] + sum(K * N for K, N in pairwise(widths)), dtype, device)
    activation, _, is_tanh = chosen["activation"].partition("_")
    torch.manual_seed(options.seed)
    try:
        made = FusedResidualStack(
            widths,
            activation=activation,
            approximate=is_tanh or "none",
            order=chosen["order"],
            skip=None if chosen["skip"] == "none" else chosen["skip"],
        )
    except (TypeError, ValueError) as error:
        raise Wrong(str(error)) from error
    return made.to(device, dtype), torch.randn(chosen["rows"], widths[0]).to(device, dtype)


def _require_memory(count: int, dtype: torch.dtype, device: torch.device) -> None:
    """Wrong where so many numbers are more than the machine holds; whatever else is computed comes on top."""
    import torch

    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        there = min(there, torch.cuda.get_device_properties(device).total_memory)
    if count * dtype.itemsize > there:
        asked, has = (f"{size / 2**30:,.0f} GiB" for size in (count * dtype.itemsize, there))
        raise Wrong(f"--sizes and --rows must fit into memory: x and the weights take {asked}, and there are {has}")


def given_alone(options: argparse.Namespace) -> Any:
    """What module:factory returns; Wrong where options of a stack are given besides."""
    if given := [name for name in (*DEFAULTS, "device") if getattr(options, name) is not None]:
        raise Wrong(f"--{given[0]} must be left out where module:factory says what to run, got {options.factory}")
    return factory.called(options)


def explained(module: Callable[..., object], *x: Any) -> Explanation:
    """`fusedres.explain`, without what it prints."""
    from ..explanation import explain

    with redirect_stdout(StringIO()):
        return explain(module, *x)


def ran(calls: Explanation) -> list[dict[str, Any]]:
    """Which backends ran how many fused calls, and why."""
    counts = Counter((call.backend, call.choice.because) for call in calls)
    return [{"calls": n, "backend": backend, "because": because} for (backend, because), n in counts.items()]


def ran_text(found: Iterable[dict[str, Any]]) -> str:
    lines = [f"{one['calls']} × {one['backend']}, because {one['because']}" for one in found]
    return "fused calls: " + ("; ".join(lines) or "none, so that nothing fused is compared here")
