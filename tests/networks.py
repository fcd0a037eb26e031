"""Networks to test, one at a time: made, called as a whole and layer by layer, differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fusedres import Network, philox
from fusedres.kernels.cpu import plan

SAME_BITS = {"rtol": 0.0, "atol": 0.0}
SINGLE = {"rtol": 1e-4, "atol": 2e-5}  # two computations in single precision of numbers near one


@dataclass
class Case:
    """A network; scales "scalar" and "channel" are learned by every layer, numbers are not."""

    sizes: tuple[int, ...]
    leading: tuple[int, ...] = (19,)
    dtype: torch.dtype = torch.float32
    activation: str = "gelu"
    approximate: str = "none"
    order: str = "pre"
    bias: bool = True
    projections: bool = False  # where sizes differ
    skip: str | None = "auto"
    skip_scale: float | str = 1.0
    branch_scale: float | str = 1.0
    last_activation: str = "same"
    drop_path: float = 0.0
    recompute: bool | str = "auto"
    stacked: bool = False  # every parameter [L, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Leaves "x", and "weight.0", "bias.0" and so on; weights scale as K ** -0.5, so that outputs stay near one."""
        made = {"x": torch.randn(*self.leading, self.sizes[0])}
        for i, (K, N) in enumerate(pairwise(self.sizes)):
            made[f"weight.{i}"] = torch.randn(N, K) * K**-0.5
            if self.bias:
                made[f"bias.{i}"] = torch.randn(N) * 0.5
            if self.projections and K != N:
                made[f"projection_weight.{i}"] = torch.randn(N, K) * K**-0.5
                if self.bias:
                    made[f"projection_bias.{i}"] = torch.randn(N) * 0.5
            if self.skip_scale == "scalar" and self.has_skip(i):
                made[f"skip_scale.{i}"] = torch.rand(()) * 0.5 + 0.5
            if isinstance(self.branch_scale, str):
                made[f"branch_scale.{i}"] = torch.rand(()) + 0.5 if self.branch_scale == "scalar" else torch.randn(N)
        if self.stacked:
            names = dict.fromkeys(name.partition(".")[0] for name in made if name != "x")
            runs = {
                name: torch.stack([t for other, t in made.items() if other.startswith(f"{name}.")]) for name in names
            }
            made = {"x": made["x"], **runs}
        return {name: t.to(self.dtype).requires_grad_() for name, t in made.items()}

    def has_skip(self, i: int) -> bool:
        return self.skip is not None and (self.sizes[i] == self.sizes[i + 1] or self.projections)

    @property
    def depth(self) -> int:
        return len(self.sizes) - 1

    def scale(self, name: str, i: int, tensors: dict[str, Tensor]) -> float | Tensor:
        value = getattr(self, name)
        return tensors.get(f"{name}.{i}", 1.0) if isinstance(value, str) else value

    def network(self, tensors: dict[str, Tensor]) -> Network:
        def of(name: str) -> Any:
            return [tensors.get(f"{name}.{i}") for i in range(self.depth)]

        described: dict[str, Any]
        if self.stacked:
            described = {"weights": tensors["weight"], "biases": tensors.get("bias")}
            described |= {name: tensors.get(name, getattr(self, name)) for name in ("skip_scale", "branch_scale")}
        else:
            described = {"weights": of("weight"), "biases": of("bias")}
            described |= {"projection_weights": of("projection_weight"), "projection_biases": of("projection_bias")}
            for name in ("skip_scale", "branch_scale"):
                described[name] = [self.scale(name, i, tensors) for i in range(self.depth)]
        options = ("activation", "approximate", "order", "skip", "last_activation", "drop_path", "recompute")
        return Network(**described, **{name: getattr(self, name) for name in options})

    def by_layers(self, layer: Callable[..., Tensor], tensors: dict[str, Tensor]) -> Tensor:
        """The network by calls of one layer each."""
        if self.stacked:
            runs = {name: t for name, t in tensors.items() if name != "x"}
            tensors = {f"{name}.{i}": t[i] for name, t in runs.items() for i in range(self.depth)} | {"x": tensors["x"]}
        x = tensors["x"]
        for i in range(self.depth):
            is_last = i == self.depth - 1 and self.last_activation == "none"
            x = layer(
                x,
                tensors[f"weight.{i}"],
                tensors.get(f"bias.{i}"),
                activation="none" if is_last else self.activation,
                approximate="none" if is_last else self.approximate,
                order=self.order,
                skip=self.skip,
                skip_scale=self.scale("skip_scale", i, tensors),
                branch_scale=self.scale("branch_scale", i, tensors),
                projection_weight=tensors.get(f"projection_weight.{i}"),
                projection_bias=tensors.get(f"projection_bias.{i}"),
                drop_path=self.drop_path,
            )
        return x


def outcome(call: Callable[[], Tensor], tensors: dict[str, Tensor], g: Tensor) -> dict[str, Tensor]:
    """y, and the gradient of every tensor."""
    torch.manual_seed(1)
    y = call()
    found = torch.autograd.grad(y, list(tensors.values()), g.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": t for name, t in zip(tensors, found, strict=True)}}


def is_one_node(y: Tensor) -> bool:
    return "ResidualNetwork" in y.grad_fn.name()


NETWORKS = {
    "narrow": Case((3, 3, 3, 3, 1)),
    "narrow-many-rows": Case((3, 3, 5, 5), leading=(700,)),
    "deep-and-narrow": Case((6,) * 30, branch_scale=0.3),
    "one-layer": Case((21, 21)),
    "one-row": Case((21, 40, 40, 7), leading=(1,)),
    "one-sample": Case((21, 40, 40, 7), leading=()),
    "medium": Case((33, 64, 64, 64, 10), leading=(150,)),
    "exact-tiles": Case((64, 64, 64), leading=(128,)),
    "wide": Case((130, 200, 200, 17), leading=(70,)),
    "mixed-widths": Case((5, 150, 3, 64, 64, 1), leading=(40,)),
    "leading-dimensions": Case((18, 18, 18), leading=(2, 3, 4)),
    "no-bias": Case((20, 20, 20), bias=False),
    "projections": Case((24, 24, 16, 8, 1), projections=True, skip_scale="scalar", branch_scale="scalar"),
    "projections-wide": Case((140, 24, 160), projections=True, skip_scale="scalar", branch_scale="channel"),
    "numbers": Case((20, 20, 20), skip_scale=0.7, branch_scale=-0.5),
    "no-skip": Case((20, 20, 20), skip=None, branch_scale="channel"),
    "linear-head": Case((20, 20, 3), last_activation="none"),
    "post-linear-head": Case((20, 20, 20), order="post", last_activation="none", skip_scale="scalar"),
    "drop-path": Case((20, 20, 20), leading=(5, 30), drop_path=0.4, skip_scale="scalar", branch_scale="channel"),
    "stacked": Case((20,) * 5, stacked=True, skip_scale="scalar", branch_scale="channel"),
    "stacked-scalars": Case((5,) * 5, stacked=True, skip_scale="scalar", branch_scale="scalar", order="post"),
}


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(6, 6) / 3 for _ in range(3))
        self.network = Network(self.weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, self.training)


def operator_arguments(case: Case) -> tuple:
    tensors = case.tensors()
    network = case.network(tensors)
    seeds = philox.draw_seeds(network.spec.dropping, case.depth) if case.drop_path else None
    return (tensors["x"], list(network._tensors), seeds, *plan.encoded(network.spec), 0)
