"""Whether fused layers are right on this machine: what `fusedres check` checks, one answer after the other.

Outputs and gradients of layers and stacks against float64, by the rules of `gradients.verdict`; integers with exact
results with ==; two runs by their bits. Other numbers of rows and widths take other ways through the CPU engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch, functional, native, reference, toolchain
from ..gradients import compare_gradients, verdict
from ..kernels.spec import ACTIVATIONS, ORDERS
from ..stack import FusedResidualStack

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SKIPS = ("identity", "projection", "concat", "none")  # there is no post with concat
SHAPES = ((1, 8), (3, 40), (37, 24), (70, 136))  # rows, width
WHOLE = (  # what whole numbers stay whole through, in sums that bfloat16 has
    ("relu", "pre", "identity"),
    ("relu", "post", "projection"),
    ("none", "pre", "concat"),
    ("none", "pre", "none"),
)
# no relu: where its z rounds across 0 in half precision, slopes differ
STACKS: dict[str, tuple[list[int], dict[str, Any], int]] = {  # sizes, options, rows
    "13 × width 3": ([3] * 13 + [1], {}, 5),
    "projections": ([24, 12, 12, 12, 5], {"skip": "projection", "activation": "sin"}, 37),
    "learned scales, post": (
        [40] * 5,
        {"order": "post", "activation": "tanh", "learn_skip_scale": True, "learn_branch_scale": "channel"},
        70,
    ),
    "4 × width 136": ([136] * 5, {"activation": "silu", "branch_scale": 0.5}, 150),
}
# One layer leaves no room for luck: as the tests' rule for sums over rows, the widest of theirs. Measured: 2.7 units.
LAYER = verdict.Rule("one layer", max_units=8.0, rms_units=6.0, roundings=0.0)
Outcome = dict[str, Tensor]  # y, and the gradient of every tensor
Call = Callable[..., Tensor]
Found = tuple[list[str], str]  # what is wrong, and what was measured


class Check(NamedTuple):
    """What was checked, how it came out, and in which figures; holds is None where there is nothing to check."""

    where: str
    what: str
    holds: bool | None
    measured: str


class Layer(NamedTuple):
    """A layer of one width and its options, with λ = 0.5 and a = 2, which round nothing."""

    rows: int
    width: int
    activation: str
    order: str
    skip: str

    def __str__(self) -> str:
        return f"{self.activation}, order {self.order}, skip {self.skip}, [{self.rows}, {self.width}]"

    @property
    def output(self) -> tuple[int, int]:
        return self.rows, self.width * (2 if self.skip == "concat" else 1)

    def options(self) -> dict[str, Any]:
        name, _, is_tanh = self.activation.partition("_")
        scales = {"branch_scale": 2.0} | ({} if self.skip == "none" else {"skip_scale": 0.5})
        kind = None if self.skip == "none" else self.skip
        return {"activation": name, "approximate": is_tanh or "none", "order": self.order, "skip": kind, **scales}

    def draw(self, number: Callable[[tuple[int, ...]], Tensor]) -> Outcome:
        M, d = self.rows, self.width
        shapes: dict[str, tuple[int, ...]] = {"x": (M, d), "weight": (d, d), "bias": (d,)}
        if self.skip == "projection":
            shapes |= {"projection_weight": (d, d), "projection_bias": (d,)}
        return {name: number(shape) for name, shape in shapes.items()}


def checks(devices: list[torch.device], seed: int) -> Iterator[Check]:
    """All of them, as they are done."""
    for device in devices:
        if device.type == "cpu":
            yield engine()
        for dtype in DTYPES:
            where = f"{device} {str(dtype).removeprefix('torch.')}"
            choice = dispatch.backend(device, dtype)
            if isinstance(choice, dispatch.Eager):
                yield Check(where, "nothing fused", None, f"eager PyTorch runs, because {choice.because}")
                continue
            chosen = layers(is_compiled=isinstance(choice, dispatch.Triton))
            torch.manual_seed(seed)
            yield tried(where, f"{len(chosen)} layers against float64", near, chosen, device, dtype)
            yield tried(where, f"{len(WHOLE)} layers of whole numbers", exact, device, dtype)
            yield tried(where, "two runs", repeated, chosen, device, dtype)
            for name in STACKS:
                yield tried(where, f"stack, {name}", stack, name, device, dtype)


def engine() -> Check:
    """The CPU engine is there, or nothing could have built it."""
    reason = native.missing()
    if reason is None:
        return Check("cpu", "the C++ engine", True, f"loaded, for {toolchain.level()}")
    try:
        toolchain.find_compiler()
        could_be = reason != native.SWITCHED_OFF
    except toolchain.Unavailable:
        could_be = False
    return Check("cpu", "the C++ engine", False if could_be else None, f"not there: {reason}")


def layers(is_compiled: bool) -> list[Layer]:
    """Every activation with every order and skip; where each is a compilation, every one of them at least once."""
    options = [one for one in product(ACTIVATIONS, ORDERS, SKIPS) if one[1:] != ("post", "concat")]
    if is_compiled:
        options = list(zip(ACTIVATIONS, cycle(ORDERS), cycle(SKIPS), strict=False))
    return [Layer(*shape, *one) for shape, one in zip(cycle(SHAPES), options, strict=False)]


def tried(where: str, what: str, check: Callable[..., Found], *arguments: Any) -> Check:
    """How a check came out. One that raises has failed too: a kernel that does not compile, say."""
    try:
        wrong, measured = check(*arguments)
    except Exception as error:
        wrong, measured = [f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"], ""
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return Check(where, what, not wrong, f"{wrong[0]}{more}" if wrong else measured)


def near(chosen: list[Layer], device: torch.device, dtype: torch.dtype) -> Found:
    """Outputs and gradients against float64, in units of eager's own error."""
    worst, wrong = 0.0, []
    for layer in chosen:
        given = {name: value.to(device, dtype) for name, value in layer.draw(_normal).items()}
        wide = {name: value.double() for name, value in given.items()}
        g = torch.randn(layer.output).to(device, dtype) * _is_off_the_kink(layer, wide, dtype)
        fused = outcome(functional.residual_linear, layer, given, g)
        eager = outcome(reference.residual_linear, layer, given, g)
        truth = outcome(reference.residual_linear, layer, wide, g.double())
        for name, true in truth.items():
            errors = verdict.errors_of(fused[name], eager[name], true)
            worst = max(worst, errors.max_units)
            rule = verdict.DOUBLE if dtype == torch.float64 else LAYER
            if against := rule.objection(errors):
                wrong.append(f"{layer}: {name} {against}")
    return wrong, f"at most {worst:.2g} units off"


def _normal(shape: tuple[int, ...]) -> Tensor:
    """Standard normals; of weights [d, d], scaled so that outputs stay near one."""
    return torch.randn(shape) * (shape[0] ** -0.5 if len(shape) == 2 and shape[0] == shape[1] else 1.0)


def _is_off_the_kink(layer: Layer, wide: Outcome, dtype: torch.dtype) -> Tensor | float:
    """Where relu's slope does not hang on how a sum was rounded; everywhere for the rest."""
    if layer.activation != "relu":
        return 1.0
    total = _call(reference.residual_linear, wide, layer.options() | {"activation": "none"})
    return (total.abs() > 8 * torch.finfo(dtype).eps).to(dtype)


def exact(device: torch.device, dtype: torch.dtype) -> Found:
    """Small whole numbers, whose results no rounding touches, with ==."""
    wrong = []
    for layer in (Layer(rows, 24, *options) for rows in (1, 3, 24) for options in WHOLE):
        given = {name: value.to(device, dtype) for name, value in layer.draw(_whole).items()}
        g = _whole(layer.output).to(device, dtype)
        truth = outcome(reference.residual_linear, layer, {k: v.double() for k, v in given.items()}, g.double())
        fused = outcome(functional.residual_linear, layer, given, g)
        off = [name for name, true in truth.items() if not torch.equal(fused[name].double(), true)]
        wrong += [f"{layer}: {name} is not exact" for name in off]
    return wrong, "every result is exact"


def _whole(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-1, 2, shape)


def repeated(chosen: list[Layer], device: torch.device, dtype: torch.dtype) -> Found:
    """Two runs give the same bits."""
    wrong = []
    for layer in chosen[:: max(1, len(chosen) // 8)]:
        given = {name: value.to(device, dtype) for name, value in layer.draw(_normal).items()}
        g = torch.randn(layer.output).to(device, dtype)
        first, second = (outcome(functional.residual_linear, layer, given, g) for _ in range(2))
        wrong += [f"{layer}: {name} has other bits" for name in first if not torch.equal(first[name], second[name])]
    return wrong, "the same bits"


def stack(name: str, device: torch.device, dtype: torch.dtype) -> Found:
    """The gradients of a network against those of its eager twin."""
    sizes, options, rows = STACKS[name]
    fused = FusedResidualStack(sizes, **options).to(device, dtype)
    comparison = compare_gradients(fused, fused.to_eager(), torch.randn(rows, sizes[0]).to(device, dtype))
    if comparison.why_no_units:
        return [comparison.why_no_units], ""
    worst = max(errors.max_units for errors in comparison.errors.values())
    return comparison.objections, f"gradients at most {worst:.2g} units off"


def outcome(call: Call, layer: Layer, tensors: Outcome, g: Tensor) -> Outcome:
    leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    y = _call(call, leaves, layer.options())
    found = torch.autograd.grad(y, list(leaves.values()), g)
    return {"y": y.detach(), **{f"d{name}": one for name, one in zip(leaves, found, strict=True)}}


def _call(call: Call, tensors: Outcome, options: dict[str, Any]) -> Tensor:
    return call(**tensors, **options)
