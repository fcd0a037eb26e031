"""The integer-exact cases of a layer's other forms: by descriptors, in one kernel, by the library, and dw in shares."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from configurations import MODES, FormConfiguration, Layer, everything
from integers import DEVICE, HAS_GPU, LAYERS, PROJECTED, compare, drawn, integers, truth_of

from fusedres.kernels.config import PersistentTile
from fusedres.kernels.spec import LayerSpec, Operands
from fusedres.kernels.triton import (
    layer_backward_inside,
    layer_library,
    layer_narrow,
    layer_persistent,
    sums,
    weight_gradient,
)

RESIDUAL = Layer(LayerSpec("relu", "post", "residual", drop_path=0.5), is_learned=True, has_residual=True)
BY_KERNEL = {
    "persistent": {"identity": LAYERS["identity"], "post-identity": LAYERS["post-identity"], "bare": LAYERS["bare"]},
    "inside": {"plain": Layer(LayerSpec("relu", skip="identity", skip_scale=2.0)), "bare": LAYERS["bare"]},
    "narrow": {"residual": RESIDUAL} | {name: LAYERS[name] for name in ("identity", "post-identity", "bare")},
    "finish": {"residual": RESIDUAL, "identity": LAYERS["identity"], "projection": PROJECTED["projection"]},
    "weight": {"bare": LAYERS["bare"]},
}
BUSY = {
    "identity": LAYERS["identity"],
    "learned": Layer(LayerSpec("relu", skip="identity", drop_path=0.5), is_learned=True),
    "post": Layer(LayerSpec("relu", "post", "identity", drop_path=0.5, branch_scale=2.0)),
}


class FormCase(NamedTuple):
    """A configuration on a layer: x [M, K], weight [N, K]."""

    configuration: FormConfiguration
    layer: str
    M: int
    N: int
    K: int

    def __str__(self) -> str:
        return f"{self.configuration}-{self.layer}-{self.M}x{self.N}x{self.K}"


def form_cases(configurations: Iterable[FormConfiguration], is_small: bool) -> Iterator[FormCase]:
    """Each configuration on every layer it is for; a few tiles each way, part empty; on a GPU enough to fill it."""
    for c in configurations:
        for name, subject in _layers(c).items():
            M, N, K = _sizes(c, is_small)
            is_square = subject.spec.skip == "identity"
            yield FormCase(c, name, M, N, N if is_square else K)


def _layers(c: FormConfiguration) -> dict[str, Layer]:
    if c.kernel == "inside" and c.keeps:
        return BUSY
    has_residual = c.kernel == "persistent" and c.tile.BLOCK_N < c.N  # whole tiles take none
    return BY_KERNEL[c.kernel] | ({"residual": RESIDUAL} if has_residual else {})


def _sizes(c: FormConfiguration, is_small: bool) -> tuple[int, int, int]:
    """N and K are multiples of 8, as the copy engine wants them in 16 bits, and not of the tile."""
    rows, width = c.tile.BLOCK_M, 8 if is_small else 264
    M = (2 if is_small else 64) * rows + 3
    if c.kernel == "narrow":
        return M, min(c.N, 128) - 3, min(c.K, 128) - 3
    if isinstance(c.tile, PersistentTile) and c.tile.BLOCK_N >= c.N:
        return M, c.N - 8, c.K - 8
    deep = getattr(c.tile, "BLOCK_K", 64)
    return M, c.tile.BLOCK_N + width, (2 if is_small else 12) * deep + 8


def form_mismatches(case: FormCase, seed: int) -> list[str]:
    """What the case's kernel wrote that is not equal to the truth, each with its number of wrong elements."""
    c = case.configuration
    dtype, precision = MODES[c.mode]
    subject = _layers(c)[case.layer]
    spec = subject.spec
    draw = torch.Generator().manual_seed(zlib.crc32(f"{case} {seed}".encode()))
    operands, g = drawn(subject, case.M, case.N, case.K, draw, dtype)
    if case.layer == "post" and c.kernel == "inside":
        scale = integers("skip_scale", (), case.K, draw).to(DEVICE, dtype)
        operands = operands._replace(skip_scale=scale)
    programs = 132 if HAS_GPU else 3
    y, kept, s, gradients = truth_of(operands, spec, g)
    if c.kernel == "persistent":
        got = layer_persistent.forward(operands, spec, dtype, c.tile, precision, c.keeps, programs)
        return compare({"y": (got[0], y), "kept": (got[1], kept if c.keeps else None)})
    if c.kernel == "finish":
        got = layer_library.forward(operands, spec, dtype, c.tile, c.keeps, spec.skip == "projection")
        return compare({"y": (got[0], y), "kept": (got[1], kept if c.keeps else None), "s": (got[2], s)})
    if c.kernel == "narrow":
        wanted = everything(operands)
        found = layer_narrow.backward(g, operands, spec, wanted, c.tile, 2 * programs, precision)
        return compare({name: (t, gradients[name]) for name, t in found._asdict().items() if t is not None})
    if c.kernel == "weight":
        dw = weight_gradient.weight_gradient(g, operands.x, dtype, c.tile, precision, programs)
        return compare({"weight": (dw, g.double().t() @ operands.x.double())})
    return _inside(g, operands, kept.to(operands.kept_dtype), gradients, spec, c, precision, programs)


def _inside(
    g: torch.Tensor,
    operands: Operands,
    kept: torch.Tensor,
    gradients: dict[str, torch.Tensor | None],
    spec: LayerSpec,
    c: FormConfiguration,
    precision: str,
    programs: int,
) -> list[str]:
    """dx and the sums, and dz by the dw that it gives."""
    if spec.activation == "none" and operands.keeps_slope:
        kept = None  # as forward leaves it
    wanted = everything(operands)
    dz, dx, parts = layer_backward_inside.dz_and_dx(g, operands, kept, spec, wanted, c.tile, precision, programs)
    found = {"x": dx, "weight": dz.double().t() @ operands.x.double(), **sums.added(parts, operands)}
    return compare({name: (t, gradients[name]) for name, t in found.items()})
