"""What a call costs the host on its way to a GPU that need not be there: launches, arguments, microseconds.

    python bench/launch_cost.py --json launch-cost.json

Once by launches that know their kernel again (kernels/triton/launching.py), once by Triton's own way, whole calls and
their first launch alone; both ways are shown to hand the launcher the same kernels and the same arguments. What the
launcher itself takes, and the GPU, is not in it, nor a product by the vendor's library.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from pretended import Driver, Launched, pretended  # before fusedres's kernels

# isort: split
import torch
from timing import in_turns, machine
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedres import FusedResidualLinear, FusedResidualStack
from fusedres.kernels.triton import (
    launching,
    layer,
    layer_backward,
    layer_backward_inside,
    layer_library,
    layer_narrow,
    layer_persistent,
    record,
    residual,
    stack,
    stack_backward,
    sums,
    weight_gradient,
)

LAUNCHERS = (
    layer,
    layer_backward,
    layer_backward_inside,
    layer_library,
    layer_narrow,
    layer_persistent,
    record,
    residual,
    stack,
    stack_backward,
    sums,
    weight_gradient,
)


class Case(NamedTuple):
    """A layer, or a stack of several, of this width, on M rows in bfloat16."""

    width: int
    M: int
    depth: int = 1
    drop_path: float = 0.0


CASES = {
    "few rows": Case(64, 8),
    "narrow": Case(64, 256),
    "wide": Case(512, 256),
    "dropping rows": Case(64, 256, drop_path=0.5),
    "stack of 8": Case(64, 256, depth=8),
}


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Each case forward, without gradients, and in training: forward and the gradients of x and all parameters."""
    for name, case in CASES.items():
        torch.manual_seed(0)
        sizes, drop_path = (case.width,) * (case.depth + 1), case.drop_path
        one = case.depth == 1
        module = FusedResidualLinear(*sizes, drop_path=drop_path) if one else FusedResidualStack(sizes)
        for trains in (False, True):
            x = torch.randn(case.M, case.width, dtype=torch.bfloat16)
            yield f"{name}, {'training' if trains else 'forward'}", _call(module.bfloat16(), x, trains)


def _call(module: nn.Module, x: Tensor, trains: bool) -> Callable[[], object]:
    x, g = x.requires_grad_(trains), torch.randn_like(x)
    given = [x, *module.parameters()]

    def call() -> object:
        with torch.set_grad_enabled(trains):
            y = module(x)
        return torch.autograd.grad(y, given, g) if trains else y

    return call


def by_triton(kernel: Any, programs: int, args: Any, compiled_for: dict[str, Any]) -> Any:
    return kernel[(programs,)](*args, **compiled_for)


@contextmanager
def replaced(launch: Callable[..., Any] | None = None) -> Iterator[None]:
    """Products by the library are left out, and launches go another way where one is given."""
    with ExitStack() as within:
        within.enter_context(mock.patch.object(layer_backward, "library_product_over_rows", _no_product))
        within.enter_context(mock.patch.object(stack_backward, "_write_products_over_rows", _no_product))
        for module in LAUNCHERS if launch else ():
            within.enter_context(mock.patch.object(module, "launch", launch))
        yield


def _no_product(dz: Tensor, x: Tensor, *more: Tensor) -> Tensor:
    return x.new_empty(dz.shape[-1], x.shape[-1], dtype=torch.float32)


def launched(driver: Driver, call: Callable[[], object]) -> list[Launched]:
    torch.manual_seed(1)
    driver.launched = []
    call()
    found, driver.launched = driver.launched, None
    return [one._replace(arguments=tuple(map(described, one.arguments))) for one in found]


def described(value: Any) -> Any:
    """What of an argument is the same in each call."""
    if isinstance(value, TensorDescriptor):
        return "descriptor", described(value.base), tuple(value.shape), tuple(value.strides), tuple(value.block_shape)
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride(), value.data_ptr() % 16
    return value


def measured(driver: Driver, call: Callable[[], object], budget_s: float) -> dict[str, Any]:
    """Its launches, how many arguments they have, and microseconds by either way."""
    with replaced(by_triton):
        expected = launched(driver, call)
    with replaced():
        first, again = launched(driver, call), launched(driver, call)
    if not expected == first == again:
        raise RuntimeError(f"expected the launches that Triton makes, {expected}, got {first} and then {again}")

    def of(launch: Callable[..., Any] | None) -> Callable[[], object]:
        def round_of() -> None:
            with replaced(launch):
                for _ in range(CALLS):
                    call()

        return round_of

    def alone(launch: Callable[..., Any]) -> Callable[[], object]:
        def round_of() -> None:
            for _ in range(CALLS):
                launch(*given)

        return round_of

    given = first_launch(call)
    ways = {"ours": of(None), "Triton's": of(by_triton)}
    once = {"ours": alone(launching.launch), "Triton's": alone(by_triton)}
    return {
        "launches": len(first),
        "arguments": [len(one.arguments) for one in first],
        "microseconds": _times(ways, budget_s),
        "of the first launch": _times(once, budget_s / 4),
    }


def first_launch(call: Callable[[], object]) -> tuple[Any, ...]:
    """What its first launch is given."""
    given: list[tuple[Any, ...]] = []
    with replaced(lambda *some: (given.append(some), launching.launch(*some))[1]):
        call()
    return given[0]


def _times(ways: dict[str, Callable[[], object]], budget_s: float) -> dict[str, dict[str, float]]:
    times = in_turns(ways, budget_s=budget_s, fill_s=0.0)
    quartiles = ("median", "lower", "upper")
    return {way: {q: round(1e3 * getattr(t, q) / CALLS, 2) for q in quartiles} for way, t in times.items()}


FIGURES = ("microseconds", "of the first launch")
CALLS = 200  # in a round, so that replacing functions is nothing beside them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=2.0, help="of rounds, a case [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with pretended() as driver:
        for name, call in calls():
            found[name] = row = measured(driver, call, options.budget_s)
            both = [[row[of][way]["median"] for of in FIGURES] for way in ("ours", "Triton's")]
            ours, theirs = (f"{whole:6.1f} µs (a launch {one:4.1f})" for whole, one in both)
            print(f"{name:<25}launches with {row['arguments']} arguments: {ours}, by Triton's way {theirs}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"kind": "launch cost", **machine("cpu"), "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
