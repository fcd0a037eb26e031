"""What compare, explain and bench run: a stack by its sizes and options, or what a callable of the user's returns."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from typing import TYPE_CHECKING, Any

from .arguments import Integer, Parser, Wrong, add_device, add_seed, one_of, sizes

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
    add("sizes", "D", sizes, f"widths d₀ … d_L, by spaces or commas [{shown}]", nargs="+")
    add("skip", "KIND", SKIPS, f"{', '.join(SKIPS.choices)} [{found['skip']}]")
    parser.add_argument("--no-skips", dest="skip", action="store_const", const="none", help="--skip none")
    add("activation", "PHI", ACTIVATIONS, f"{', '.join(ACTIVATIONS.choices)} [{found['activation']}]")
    add("order", "pre|post", one_of("pre", "post"), f"the activation before the addition or after [{found['order']}]")
    add("rows", "M", Integer(1), f"of x, which is drawn from standard normals [{found['rows']}]")
    add("dtype", "DTYPE", DTYPES, f"{', '.join(DTYPES.choices)} [{found['dtype']}]")
    add_seed(parser)
    add_device(parser)


def add_factory(parser: Parser, returns: str) -> None:
    parser.add_argument(
        "factory", metavar="module:factory", nargs="?", help=f"a callable of yours that returns {returns}"
    )


def stack(options: argparse.Namespace, device: torch.device) -> tuple[FusedResidualStack, torch.Tensor]:
    """The stack that the options describe, and x [rows, d₀]."""
    import torch

    from ..stack import FusedResidualStack

    given = {name: getattr(options, name) for name in DEFAULTS}
    chosen = options.stack_defaults | {name: value for name, value in given.items() if value is not None}
    widths = [width for part in chosen["sizes"] for width in (part if isinstance(part, list) else [part])]
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
    dtype = getattr(torch, chosen["dtype"])
    return made.to(device, dtype), torch.randn(chosen["rows"], widths[0]).to(device, dtype)


def from_factory(options: argparse.Namespace) -> Any:
    """What the callable returns, under --seed; Wrong, in one line, for whatever goes wrong on the way."""
    import torch

    if given := [name for name in (*DEFAULTS, "device") if getattr(options, name) is not None]:
        raise Wrong(f"--{given[0]} must be left out where module:factory says what to run, got {options.factory}")
    name, _, attribute = options.factory.partition(":")
    if not name or not attribute.isidentifier():
        raise Wrong(
            f"module:factory must name a module and a callable in it, as in models:twins, got {options.factory}"
        )
    sys.path.insert(0, os.getcwd())
    try:
        module = import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise Wrong(f"module:factory must name a module, and there is no {name} here or installed") from None
        raise Wrong(f"module {name} does not import: {told(error)}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        has = "is not callable" if hasattr(module, attribute) else "is not there"
        raise Wrong(f"module:factory must name a callable in {name}: {attribute} {has}")
    torch.manual_seed(options.seed)
    try:
        return factory()
    except Exception as error:
        raise Wrong(f"{options.factory}() raised {told(error)}") from error


def told(error: BaseException) -> str:
    """The error in one line, and where it was raised."""
    said = (str(error).splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {said}{where}"


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
