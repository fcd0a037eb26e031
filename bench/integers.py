"""Layers of integers small enough that every result is exact, and what comes of them in float64."""

from __future__ import annotations

import os

import torch

os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))  # triton reads it as it defines kernels
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # dW is a library's product: let it be deterministic

import torch.nn.functional as F
from configurations import Layer
from torch import Tensor

from fusedres import reference
from fusedres.kernels.spec import LayerSpec, Operands

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"

# relu and no activation keep integers; λ, a and 1 / (1 - drop_path) are powers of two
LAYERS = {
    "everything": Layer(LayerSpec("relu", "post", "residual", drop_path=0.5), is_learned=True, has_residual=True),
    "identity": Layer(LayerSpec("relu", skip="identity", skip_scale=2.0, drop_path=0.5)),
    "post-identity": Layer(LayerSpec("relu", "post", skip="identity", branch_scale=-2.0), is_learned=True),
    "concat": Layer(LayerSpec("relu", skip="concat", drop_path=0.5), is_learned=True),
    "bare": Layer(LayerSpec("none", branch_scale=2.0)),
}
PROJECTED = {
    "everything": Layer(LayerSpec("relu", "post", "projection", drop_path=0.5), is_learned=True),
    "projection": Layer(LayerSpec("relu", skip="projection", skip_scale=2.0)),
}


def drawn(subject: Layer, M: int, N: int, K: int, draw: torch.Generator, dtype: torch.dtype) -> tuple[Operands, Tensor]:
    """Operands of a layer x [M, K] -> [M, N], and g, its output's gradient."""

    def make(name: str, *shape: int) -> Tensor:
        return integers(name, shape, K, draw).to(DEVICE, dtype)

    operands = subject.operands(M, N, K, make)
    if operands.seed is not None:
        operands = operands._replace(seed=torch.randint(2**62, (), generator=draw))
    columns = N + (K if subject.spec.skip == "concat" else 0)
    return operands, integers("g", (M, columns), K, draw).to(DEVICE, dtype)


def integers(name: str, shape: tuple[int, ...], depth: int, draw: torch.Generator) -> Tensor:
    """Integers whose products over `depth` stay near 5, where fp16 and bf16 still count by one; scales are ± 1 or 2."""
    if name in ("skip_scale", "branch_scale"):
        return torch.tensor([-2.0, -1.0, 1.0, 2.0])[torch.randint(4, shape, generator=draw)]
    values = torch.randint(-2, 3, shape, generator=draw).double()
    if name in ("x", "weight", "projection_weight"):
        density = min(1.0, (6 / depth) ** 0.5)
        values *= torch.rand(shape, generator=draw) < density
    return values


def truth_of(
    operands: Operands, spec: LayerSpec, g: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor | None]]:
    """y, what is kept, s and every gradient from the reference in float64, which holds these integers exactly."""
    wide = Operands(*(None if t is None else t.double().requires_grad_() for t in operands[:-1]), operands.seed)
    y = reference.layer(wide, spec)
    names = [name for name, t in wide._asdict().items() if t is not None and name != "seed"]
    inputs = [getattr(wide, name) for name in names]
    gradients = dict(zip(names, torch.autograd.grad(y, inputs, g.double(), allow_unused=True), strict=True))
    kept = F.linear(wide.x, wide.weight, wide.bias).detach()
    if operands.keeps_slope:
        at = reference.layer(wide, spec._replace(activation="none")) if spec.activates_sum else kept
        kept = (at.detach() > 0).double() if spec.activation == "relu" else torch.ones_like(kept)
    s = None
    if spec.skip == "projection":
        s = F.linear(wide.x, wide.projection_weight, wide.projection_bias).detach()
    for value in (kept, s):
        if value is not None and not torch.equal(value, value.to(operands.x.dtype).double()):
            raise AssertionError("what is kept is not representable: draw smaller integers")
    return y.detach(), kept, s, gradients


def compare(pairs: dict[str, tuple[Tensor | None, Tensor | None]], when: str = "") -> list[str]:
    found = []
    for name, (got, truth) in pairs.items():
        if truth is None:
            continue
        wrong = int((got != truth.to(got.dtype)).sum())  # NaN, which unwritten memory is filled with, differs too
        if wrong:
            found.append(f"{name}{when}: {wrong} of {truth.numel()} wrong")
    return found
