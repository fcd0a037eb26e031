"""The sum that ends a residual block, y = a b + λ x, fused against PyTorch's operations, on the CPU.

    python bench/residual.py [--numbers 1000 10000000] [--threads 1 2] [--json FILE]

Opponents, in turn: the plain formula, and the fewest operations that PyTorch has for it (`reference.residual`).
Checks gradients against float64 first. Every size goes to the kernels here, whatever dispatch would choose.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timing import host, in_turns
from torch import Tensor

from fusedres import checks, functional, reference, residual_dispatch

CHANNELS = 64
KINDS: dict[str, dict[str, Any]] = {  # scales: numbers, and learned ones as tensors of this shape
    "a learned": {"branch_scale": ()},
    "a, λ learned": {"branch_scale": (), "skip_scale": ()},
    "a, λ numbers": {"branch_scale": 0.3, "skip_scale": 0.7},
    "a by channel, last": {"branch_scale": (CHANNELS,)},
    "a by channel, first of images": {"branch_scale": (CHANNELS,), "channel_dim": 1},
    "a learned, samples dropped": {"branch_scale": (), "drop_path": 0.2},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def shape(numbers: int, kind: str) -> tuple[int, ...]:
    """Rows of CHANNELS, or images of CHANNELS."""
    if "images" not in kind:
        return (max(1, numbers // CHANNELS), CHANNELS)
    side = 8 if numbers >= 64 * CHANNELS else 4
    return (max(1, numbers // (CHANNELS * side * side)), CHANNELS, side, side)


def plain(branch: Tensor, x: Tensor, *, skip_scale: Any = 1.0, branch_scale: Any = 1.0, **_: Any) -> Tensor:
    def scaled(scale: Any, value: Tensor) -> Tensor:
        if isinstance(scale, Tensor) and scale.dim() and value.dim() == 4:
            scale = scale.view(-1, 1, 1)
        return value if isinstance(scale, float) and scale == 1.0 else scale * value

    return scaled(branch_scale, branch) + scaled(skip_scale, x)


def fewest(branch: Tensor, x: Tensor, **options: Any) -> Tensor:
    given = {"skip_scale": 1.0, "branch_scale": 1.0, "channel_dim": -1, "drop_path": 0.0, **options}
    terms, spec = checks.described_sum(branch, x, *given.values(), True)
    if spec.drop_path > 0:
        terms = terms._replace(seed=torch.tensor(1))
    return reference.residual(terms, spec)


def measure(kind: str, dtype: torch.dtype, numbers: int, budget_s: float) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = shape(numbers, kind)
    branch, x, g = (torch.randn(sizes).to(dtype) for _ in range(3))
    options = {k: torch.rand(v).to(dtype) if isinstance(v, tuple) else v for k, v in KINDS[kind].items()}
    tensors = [branch, x, *(t for t in options.values() if isinstance(t, Tensor))]
    calls: dict[str, Callable[..., Tensor]] = {"fused": functional.residual, "fewest": fewest}
    if not options.get("drop_path"):
        calls["plain"] = plain
        check(options, tensors, g)
    found = {}
    for mode in ("forward", "training"):
        for tensor in tensors:
            tensor.requires_grad_(mode == "training")

        def run(call: Callable[..., Tensor], mode: str = mode) -> None:
            y = call(branch, x, **options)
            if mode == "training":
                torch.autograd.grad(y, tensors, g)

        times = in_turns({name: (lambda call=call: run(call)) for name, call in calls.items()}, budget_s)
        found[mode] = {name: time._asdict() for name, time in times.items()}
    return {"kind": kind, "dtype": str(dtype).removeprefix("torch."), "shape": sizes, "milliseconds": found}


def check(options: dict[str, Any], tensors: list[Tensor], g: Tensor) -> None:
    """AssertionError unless gradients are as close to float64 as eager's are."""
    outcomes = []
    for call, dtype in ((plain, torch.float64), (plain, g.dtype), (functional.residual, g.dtype)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        scales = iter(leaves[2:])
        given = {k: next(scales) if isinstance(v, Tensor) else v for k, v in options.items()}
        outcomes.append(torch.autograd.grad(call(*leaves[:2], **given), leaves, g.to(dtype)))
    for truth, eager, fused in zip(*outcomes, strict=True):
        theirs, ours = ((t.double() - truth.double()).norm() / truth.norm() for t in (eager, fused))
        terms = g.numel() / truth.numel()  # of a sum near 0, as √terms, with a rounding each
        assert ours <= 4 * max(theirs, torch.finfo(g.dtype).eps * terms**0.5), (options.keys(), g.dtype, ours, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="+", default=[10**p for p in range(3, 8)])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--budget-s", type=float, default=0.5, help="of each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = []
    with mock.patch.multiple(residual_dispatch, LEAST=0, LEAST_OF_ONE_PASS=0):
        for threads, kind, dtype, numbers in product(options.threads, options.kind, options.dtype, options.numbers):
            torch.set_num_threads(threads)
            row = {"threads": threads, **measure(kind, DTYPES[dtype], numbers, options.budget_s)}
            rows.append(row)
            said = []
            for mode, times in row["milliseconds"].items():
                best = min(time["median"] for name, time in times.items() if name != "fused")
                said.append(f"{mode} {times['fused']['median']:.4f} ms, {best / times['fused']['median']:.2f} times")
            print(f"{threads} {kind:<30}{dtype:<9}{numbers:>9}: {'; '.join(said)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"kind": "residual", **host(), "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
