"""Whom a network on the CPU is measured against, all with the same parameters, and whether their answers are right.

eager       nn.Linear, gelu and the sum, layer by layer
compile     torch.compile of that module, and again with mode="max-autotune"
fused       fusedres.network.Network of the same parameters
stacked     fusedres.FusedResidualStack, each run of equal layers in one parameter [L, N, N]
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cpu_cases import Row
from torch import Tensor, nn

COMPILED = {"compile": "default", "compile-autotuned": "max-autotune"}
WAYS = ("eager", *COMPILED, "fused", "stacked")

# How far from float64 an answer may be, in units of eager's own distance. Sums in another order stay below these;
# a lost or doubled term does not. Eager may be exact by luck, on few numbers above all: it counts as wrong by at least
# the roundings of its layers, √depth of the largest value.
MAX_LIMIT = 8.0
RMS_LIMIT = 3.0
FEW = 16  # numbers, below which tensors of one kind are compared together: alone they have no mean to speak of


class EagerNetwork(nn.Module):
    """x [M, d₀] -> [M, d_L] in PyTorch's own operations: gelu(linear(x)), and λ x added where sizes agree."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, N, dtype=row.dtype) for K, N in row.layers)
        learns = [row.learns and skips for skips in row.skips]
        self.scales = nn.ParameterList(nn.Parameter(torch.ones((), dtype=row.dtype)) for is_one in learns if is_one)
        place = iter(range(row.depth))
        self.scale_of = [next(place) if is_one else None for is_one in learns]
        self.skips = row.skips
        with torch.no_grad():
            for layer, skips in zip(self.layers, row.skips, strict=True):
                depth = row.depth if skips else 1  # or what a thousand layers add would leave the range of numbers
                layer.weight.copy_(torch.randn(layer.weight.shape) * (depth * layer.in_features) ** -0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape) * 0.1 * depth**-0.5)
            for scale in self.scales:
                scale.copy_(1 + 0.1 * row.depth**-0.5 * torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        for layer, skips, place in zip(self.layers, self.skips, self.scale_of, strict=True):
            y = F.gelu(layer(x))
            if place is not None:
                x = self.scales[place] * x
            x = x + y if skips else y
        return x


@dataclass
class Contender:
    """A network, its parameters, and how tensors shaped as those go by layer: {"weight 3": …}."""

    network: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    by_layer: Callable[[list[Tensor]], dict[str, Tensor]]

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, x: Tensor, target: Tensor) -> None:
        """Mean squared error of the answer, and backward to all parameters. Old gradients are let go, not zeroed."""
        for parameter in self.parameters:
            parameter.grad = None
        F.mse_loss(self.network(x), target).backward()

    def call(self, kind: str, x: Tensor, target: Tensor) -> Callable[[], object]:
        """What is timed; for F it is to be called without gradients."""
        return partial(self.network, x) if kind == "F" else partial(self.step, x, target)

    def answer(self, kind: str, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """{"y": …} of F; of FB {"y": …, "weight 0": its gradient, …}. Copies."""
        if kind == "F":
            with torch.no_grad():
                return {"y": self.network(x).clone()}
        self.clear()
        y = self.network(x)
        F.mse_loss(y, target).backward()
        answer = {"y": y.detach().clone()}
        found = [parameter.grad for parameter in self.parameters]
        if any(gradient is None for gradient in found):
            raise AssertionError("a parameter got no gradient")
        answer |= {name: gradient.clone() for name, gradient in self.by_layer(found).items()}
        self.clear()
        return answer


def of_module(module: EagerNetwork, network: Callable[[Tensor], Tensor] | None = None) -> Contender:
    """The module itself, or another network with its parameters."""
    named = {f"{kind} {i}": tensor for kind, tensors in _named(module).items() for i, tensor in tensors.items()}
    parameters = list(named.values())
    return Contender(
        module if network is None else network, parameters, lambda found: dict(zip(named, found, strict=True))
    )


def fused(module: EagerNetwork, row: Row, **options: object) -> Contender:
    """The very parameters of the module."""
    from fusedres.network import Network

    named = _named(module)
    scales = [named["scale"].get(i, 1.0) for i in range(row.depth)] if row.learns else 1.0
    weights, biases = list(named["weight"].values()), list(named["bias"].values())
    return of_module(module, Network(weights, biases, skip_scale=scales, **options))


def stacked(module: EagerNetwork, row: Row, **options: object) -> Contender:
    """The module for whole networks, with copies of the parameters, those of equal layers stacked."""
    from fusedres import FusedResidualStack

    stack = FusedResidualStack(row.sizes, learn_skip_scale=row.learns and any(row.skips), dtype=row.dtype, **options)
    names = {"weight": "layers.{}.0.weight", "bias": "layers.{}.0.bias", "scale": "skip_scales.{}"}
    kinds = {names[kind].format(i): (kind, i) for kind, tensors in _named(module).items() for i in tensors}
    stack.load_state_dict({name: _named(module)[kind][i] for name, (kind, i) in kinds.items()})
    own, parameters = zip(*stack.named_parameters(), strict=True)

    def by_layer(found: list[Tensor]) -> dict[str, Tensor]:
        slices = stack.by_layer(dict(zip(own, found, strict=True)))
        return {"{} {}".format(*kinds[name]): slice for name, slice in slices.items()}

    return Contender(stack, list(parameters), by_layer)


def compiled(module: EagerNetwork, way: str) -> Contender:
    from torch._inductor import select_algorithm  # a second's import, for those who compile

    select_algorithm.PRINT_AUTOTUNE = False
    return of_module(module, torch.compile(module, mode=COMPILED[way], dynamic=False))


def draw(row: Row) -> tuple[EagerNetwork, Tensor, Tensor]:
    """(module, x, target), the same each time."""
    torch.manual_seed(0)
    module = EagerNetwork(row)
    x = torch.randn(row.M, row.sizes[0]).to(row.dtype)
    return module, x, torch.randn(row.M, row.sizes[-1]).to(row.dtype)


def _named(module: EagerNetwork) -> dict[str, dict[int, Tensor]]:
    """{weight, bias, scale: {layer: parameter}}."""
    places = enumerate(module.scale_of)
    return {
        "weight": {i: layer.weight for i, layer in enumerate(module.layers)},
        "bias": {i: layer.bias for i, layer in enumerate(module.layers)},
        "scale": {i: module.scales[place] for i, place in places if place is not None},
    }


# ---------------------------------------------------------------------------------------------- right answers


def truth(module: EagerNetwork, row: Row, kind: str, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Eager's answer in float64."""
    wide = EagerNetwork(row).double()
    wide.load_state_dict(module.state_dict())
    return of_module(wide).answer(kind, x.double(), target.double())


def errors(
    answer: dict[str, Tensor], own: dict[str, Tensor], exact: dict[str, Tensor], depth: int
) -> dict[str, dict[str, float]]:
    """{name: {max, rms}}: distances from exact in units of `own`, eager's answer. Small tensors of a kind are one."""
    eps = torch.finfo(own["y"].dtype).eps
    found = {}
    for name, names in _together(exact).items():
        a, o, e = (torch.cat([tensors[n].double().flatten() for n in names]) for tensors in (answer, own, exact))
        if not torch.isfinite(a).all():
            found[name] = {"max": float("inf"), "rms": float("inf")}
            continue
        largest = (
            e.abs().max().clamp_min(1.0 if name == "y" else 1e-30)
        )  # an output near zero is a sum of terms near one
        unit = eps * depth**0.5 * largest
        typical = 0.29 * unit if e.numel() >= FEW else unit  # of few numbers all may be a rounding off
        mine, theirs = a - e, o - e
        found[name] = {
            "max": float(mine.abs().max() / torch.maximum(theirs.abs().max(), unit)),
            "rms": float(_rms(mine) / torch.maximum(_rms(theirs), typical)),
        }
    return found


def wrong(found: dict[str, dict[str, float]]) -> list[str]:
    """What is further from the truth than the limits allow."""
    return [
        f"{name}: largest error {error['max']:.3g} of eager's, allowed {MAX_LIMIT:g}; "
        f"rms {error['rms']:.3g}, allowed {RMS_LIMIT:g}"
        for name, error in found.items()
        if not (error["max"] <= MAX_LIMIT and error["rms"] <= RMS_LIMIT)
    ]


def worst(found: dict[str, dict[str, float]]) -> dict[str, float]:
    return {measure: max(error[measure] for error in found.values()) for measure in ("max", "rms")}


def _together(exact: dict[str, Tensor]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, tensor in exact.items():
        is_alone = tensor.numel() >= FEW or name == "y"
        groups.setdefault(name if is_alone else f"every small {name.split()[0]}", []).append(name)
    return groups


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()


# ---------------------------------------------------------------------------------------------- beside the point


class Chosen(NamedTuple):
    """What the dispatcher chose for a call, in a line, and whether it left it to eager."""

    line: str
    is_eager: bool


def chosen(network: Callable[[Tensor], Tensor], x: Tensor) -> Chosen:
    """What `fusedres.explain` says of a network's call."""
    from fusedres import explain

    with contextlib.redirect_stdout(io.StringIO()):
        calls = explain(network, x)
    reasons = [line.strip() for line in str(calls).splitlines() if "because" in line]
    reasons = list(dict.fromkeys(line.partition(": ")[2] if "]" in line else line for line in reasons))  # not the shape
    line = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    return Chosen(line, all(call.backend == "eager" for call in calls))


class TooLong(BaseException):
    """Not an Exception, which compilers catch and wrap."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooLong within the block when its time is up, and again each half minute until the block is left.

    Not sooner: what the block has to tidy up as it is left would be interrupted too.
    """
    if seconds <= 0:
        raise TooLong

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 30.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def abandon_compilation() -> None:
    """After TooLong: ends the compilers that threads of this process still wait for, which would be in later figures.

    Raises RuntimeError where the interruption left torch in a mode that changes what is measured.
    """
    until = time.perf_counter() + 10
    quiet = 0
    while quiet < 5 and time.perf_counter() < until:
        found = _child_compilers()
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        quiet = 0 if found else quiet + 1
        time.sleep(0.1)
    torch._dynamo.reset()
    if torch.is_anomaly_enabled() or not torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
        raise RuntimeError("an interrupted torch.compile left its modes behind: leave it out with a limit of 0 s")


def _child_compilers() -> list[int]:
    """The processes below this one that are a compiler, by what Linux says of them; elsewhere none."""
    parents, names = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, rest = stat.read_text().rpartition(")")
            number, _, name = head.partition(" (")
            state, parent = rest.split()[:2]
            if state != "Z":
                parents[int(number)], names[int(number)] = int(parent), name

    def is_below(process: int) -> bool:
        while process in parents and process != os.getpid():
            process = parents[process]
        return process == os.getpid()

    is_compiler = re.compile(r"(cc1plus|as|ld|collect2|lld|(.*-)?(c\+\+|g\+\+|clang)(\+\+)?(-[\d.]+)?)").fullmatch
    return [process for process, name in names.items() if is_compiler(name) and is_below(process)]
