"""A physics-informed loss, mean (∇²u)² by backward of backward, and its gradient: the stack against eager PyTorch.

    python bench/laplacian.py [--rows 1024 16384] [--json FILE]

u: [2, 64, 64, 64, 64, 64, 64, 1], the last layer linear. Checks gradients against float64 before it times anything.
torch.compile has no double backward to compare with. On the CPU.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timing import host, in_turns
from torch import Tensor, nn

from fusedres import FusedResidualStack
from fusedres.reference import ResidualStack

SIZES = [2, *[64] * 6, 1]
LIMIT = 4.0  # times eager's own distance from float64


def laplacian(u: nn.Module, x: Tensor) -> Tensor:
    """[M] of x [M, 2]."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(u(x).sum(), x, create_graph=True)
    return sum(torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1]))


def step(u: nn.Module, x: Tensor) -> None:
    for parameter in u.parameters():
        parameter.grad = None
    laplacian(u, x).square().mean().backward()


def gradients(u: nn.Module, x: Tensor) -> Tensor:
    """Of all weights, end to end."""
    step(u, x)
    named = {name: p.grad for name, p in u.named_parameters()}
    named = u.by_layer(named) if isinstance(u, FusedResidualStack) else named
    return torch.cat([g.flatten() for name, g in named.items() if name.endswith("weight")])


def measure(activation: str, dtype: torch.dtype, M: int, budget_s: float) -> dict[str, Any]:
    torch.manual_seed(0)
    eager = ResidualStack(SIZES, activation=activation, last_activation="none", dtype=dtype)
    fused = FusedResidualStack.from_eager(eager)
    exact = ResidualStack(SIZES, activation=activation, last_activation="none", dtype=torch.float64)
    exact.load_state_dict(eager.state_dict())
    x = torch.randn(M, 2, dtype=dtype)
    step(fused, x)  # which tells the network how it is used
    truth = gradients(exact, x.double())
    ours, theirs = (float((gradients(u, x) - truth).norm() / truth.norm()) for u in (fused, eager))
    if ours > LIMIT * max(theirs, torch.finfo(dtype).eps):
        raise AssertionError(f"{activation} {dtype} {M}: error {ours:.2g}, eager's is {theirs:.2g}")
    times = in_turns({"eager": partial(step, eager, x), "fused": partial(step, fused, x)}, budget_s)
    return {
        "activation": activation,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": M,
        "relative_error": {"eager": theirs, "fused": ours},
        "milliseconds": {name: t._asdict() for name, t in times.items()},
        "over_eager": times["eager"].median / times["fused"].median,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 4096, 16384])
    parser.add_argument("--budget-s", type=float, default=5.0, help="of each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = []
    for activation, dtype, M in product(("gelu", "sin", "tanh"), (torch.float32, torch.float64), options.rows):
        one = measure(activation, dtype, M, options.budget_s)
        found.append(one)
        eager, fused = (one["milliseconds"][name]["median"] for name in ("eager", "fused"))
        print(
            f"{activation:<5}{one['dtype']:<9}{M:>6} rows: eager {eager:8.2f} ms, fused {fused:8.2f} ms, "
            f"{one['over_eager']:.2f} times as fast; error {one['relative_error']['fused']:.1e}, "
            f"eager's {one['relative_error']['eager']:.1e}",
            flush=True,
        )
    if options.json:
        options.json.write_text(
            json.dumps({"kind": "laplacian", **host(), "sizes": SIZES, "found": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
