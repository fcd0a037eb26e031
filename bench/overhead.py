"""What a call costs before any arithmetic: FusedResidualLinear against eager PyTorch on layers too small to matter.

    python bench/overhead.py --json overhead.json

On a CPU also layers of fewer operations, and of more rows. Then the three general ways into the fused layer
(`fusedres/ops.py`) against one another, with the launchers replaced by a few cheap operations: what is left is what
each way's node costs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from timing import Timing, interleaved, machine
from torch import Tensor, nn

from fusedres import FusedResidualLinear, dispatch, ops
from fusedres.kernels.spec import Gradients, LayerSpec, Operands, Wanted

SHAPES = ((1, 16), (8, 16))
MORE_SHAPES = ((10, 64), (64, 64), (10, 128))  # of networks that people call layer by layer
CALLS = 20  # in a run: one call alone is too short for a clock


class Eager(nn.Linear):
    """x + gelu(z): the same layer in three operations."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(F.linear(x, self.weight, self.bias))


class EagerSum(nn.Linear):
    """relu(x + z), which ends a residual block."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + F.linear(x, self.weight, self.bias))


class EagerRelu(nn.Linear):
    """relu(z): no layer takes fewer operations."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.weight, self.bias))


LAYERS: dict[str, tuple[type[nn.Linear], dict]] = {
    "x + gelu(z)": (Eager, {}),
    "relu(x + z)": (EagerSum, {"activation": "relu", "order": "post"}),
    "relu(z)": (EagerRelu, {"activation": "relu", "skip": None}),
}


def forward_and_step(layers: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, device: str, runs: int) -> dict:
    """{forward, training: {layer: Timing}}; training is a forward and a backward to every tensor that wants one."""
    x = x.clone().requires_grad_()
    g = torch.randn_like(layers[next(iter(layers))](x))

    def forward(layer: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return call

    def step(layer: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: layer(x).backward(g)

    return {
        kind: interleaved({name: of(layer) for name, layer in layers.items()}, device, runs, CALLS, warm=True)
        for kind, of in (("forward", forward), ("training", step))
    }


def modules(name: str, M: int, d: int, device: str, runs: int) -> dict:
    """FusedResidualLinear and the same layer in eager operations; `again` is eager once more: the noise."""
    eager, options = LAYERS[name]
    layers = {
        "eager": eager(d, d, device=device),
        "fusedres": FusedResidualLinear(d, device=device, **options),
        "again": eager(d, d, device=device),
    }
    return forward_and_step(layers, torch.randn(M, d, device=device), device, runs)


def ways_in(M: int, d: int, device: str, runs: int) -> dict:
    """The plain Function, the one with setup_context, the registered operator, all over the same stub."""
    weight = torch.randn(d, d, device=device, requires_grad=True)
    bias = torch.randn(d, device=device, requires_grad=True)
    spec = LayerSpec(skip="identity")

    def operands(x: Tensor) -> Operands:
        return Operands(x, weight, bias)

    layers = {
        "function": lambda x: ops._Layer.apply(spec, *operands(x)),
        "setup_context": lambda x: ops._TransformableLayer.apply(spec, *operands(x))[0],
        "operator": lambda x: torch.ops.fusedres.residual_linear(*operands(x), *spec, torch.is_grad_enabled())[0],
    }
    with mock.patch.object(ops, "_forward", _stub_forward), mock.patch.object(ops, "_backward", _stub_backward):
        return forward_and_step(layers, torch.randn(M, d, device=device), device, runs)


def _stub_forward(operands: Operands, spec: LayerSpec, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x = operands.x
    y = torch.empty_like(x)
    return y, torch.empty_like(x) if keep else None, None


def _stub_backward(
    g: Tensor, operands: Operands, z: Tensor | None, s: Tensor | None, spec: LayerSpec, wanted: Wanted
) -> Gradients:
    return Gradients(
        *(torch.zeros_like(t) if is_wanted else None for t, is_wanted in zip(operands[:-1], wanted, strict=True))
    )


def report(title: str, found: dict[str, dict[str, Timing]]) -> None:
    print(title)
    for kind, times in found.items():
        first = next(iter(times.values())).median
        for name, t in times.items():
            us = f"{t.median * 1e3:7.1f} us ({t.p10 * 1e3:.1f} to {t.p90 * 1e3:.1f})"
            print(f"    {kind:<9}{name:<14}{us:<30}{t.median / first:6.2f} of {next(iter(times))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    device = options.device
    torch.set_num_threads(1)  # waking threads for sixteen numbers would drown what is measured
    choice = dispatch.choose(torch.device(device), torch.float32, is_empty=False)
    print(f"fusedres: {type(choice).__name__}, because {choice.because}")
    torch.manual_seed(0)
    found = {}
    for name in LAYERS if device == "cpu" else list(LAYERS)[:1]:  # on a GPU each is a compilation
        for M, d in SHAPES + (MORE_SHAPES if device == "cpu" else ()):
            found[f"{name} [{M}, {d}]"] = result = modules(name, M, d, device, options.runs)
            report(f"module, {name}, x [{M}, {d}]", result)
    for M, d in SHAPES:
        found[f"ways in, stubbed [{M}, {d}]"] = result = ways_in(M, d, device, options.runs)
        report(f"ways in, stubbed, x [{M}, {d}]", result)
    if options.json:
        times = {
            title: {kind: {name: t._asdict() for name, t in ts.items()} for kind, ts in kinds.items()}
            for title, kinds in found.items()
        }
        record = {**machine(device), "fusedres": f"{type(choice).__name__}: {choice.because}", "milliseconds": times}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
