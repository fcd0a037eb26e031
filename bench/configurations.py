"""What ships: every tile that dispatch can choose for a kernel, and layers to run the kernels on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres import dispatch, plans, residual_dispatch
from fusedres.kernels.config import (
    Elementwise,
    Inside,
    PersistentTile,
    Plan,
    Separate,
    SplitTile,
    StackTile,
    SumTile,
    Tile,
    Together,
)
from fusedres.kernels.spec import PER, LayerSpec, Operands, Run, View, Wanted

KERNELS = ("forward", "dz", "dx")  # of a layer, by pointers
FORMS = ("persistent", "inside", "narrow", "finish", "weight", "sums")  # the other kernels of a layer
STACK_KERNELS = ("stack_forward", "stack_backward")
SUM_KERNELS = ("sum_forward", "sum_backward")
RECORD_KERNELS = ("statistics",)  # of gradients that no kernel of a layer records
SUM_LENGTHS = (4, 64, 4096)  # of a row of the sum's memory: narrow tiles, middling ones, and lines
STACK_WIDTHS = (16, 32, 64, 128, 256)  # that others are padded to
SIZES = sorted({2**p + more for p in range(14) for more in (0, 1)})  # both sides of every power of two up to 8192
SKIPS = ("identity", "none", "projection")


class Mode(NamedTuple):
    """The dtype of a layer, and how its products multiply."""

    dtype: torch.dtype
    precision: str


MODES = {
    "fp32": Mode(torch.float32, "ieee"),
    "tf32": Mode(torch.float32, "tf32"),
    "fp16": Mode(torch.float16, "ieee"),
    "bf16": Mode(torch.bfloat16, "ieee"),
}


class Configuration(NamedTuple):
    """A kernel, and a tile that dispatch gives it in this mode, for these layers."""

    kernel: str
    mode: str
    has_projection: bool
    is_ragged: bool  # a width is no multiple of 16, for which Triton specialises kernels
    tile: Tile

    def __str__(self) -> str:
        skip = "projection" if self.has_projection else "tensor"
        return f"{self.kernel}-{self.mode}-{skip}-{'ragged' if self.is_ragged else 'aligned'}-{name(self.tile)}"


class StackConfiguration(NamedTuple):
    """A run's kernel, and a tile that dispatch gives it in this mode, for widths up to this one."""

    kernel: str
    mode: str
    width: int
    is_ragged: bool  # a width that is padded
    sums_weight: bool  # backward sums dw, else it writes dz
    tile: StackTile

    @property
    def d(self) -> int:
        return self.width - 3 if self.is_ragged else self.width

    def __str__(self) -> str:
        form = "" if self.kernel == "stack_forward" else "-sums" if self.sums_weight else "-dz"
        return f"{self.kernel}-{self.mode}-{self.d}{form}-{name(self.tile)}"


class SumConfiguration(NamedTuple):
    """A kernel of a residual block's sum, and the tile that dispatch gives it in this mode for rows of this length."""

    kernel: str
    mode: str
    per: str
    length: int
    is_ragged: bool  # a length that Triton does not specialise for

    @property
    def view(self) -> View:
        """Of 1024 rows, in samples of two."""
        N = self.length + self.is_ragged
        if self.per == "column":
            return View(512, 2 * N, 512, N, PER.index("column"))
        return View(1024, N, 512, 8 if self.per == "stretch" else 1, PER.index(self.per))

    @property
    def tile(self) -> SumTile:
        return residual_dispatch.tile(self.view, MODES[self.mode].dtype.itemsize)

    def __str__(self) -> str:
        return f"{self.kernel}-{self.mode}-per-{self.per}-{self.length + self.is_ragged}-{name(self.tile)}"


def shipped_sums() -> list[SumConfiguration]:
    """The sum's kernels on tiles of every form; fp16 compiles to what bf16 does."""
    rows = product(SUM_KERNELS, ("fp32", "bf16"), PER, SUM_LENGTHS, (False, True))
    return [SumConfiguration(*row) for row in rows]


def shipped_records() -> list[FormConfiguration]:
    """Of gradients alone, and of those with a branch's half beside them."""
    rows = product(RECORD_KERNELS, ("fp32", "bf16"), (128,), (128,), (False, True))
    return [FormConfiguration(*row, Elementwise(16, 128, 4)) for row in rows]


def name(tile: Tile | StackTile | SumTile | PersistentTile | SplitTile | Elementwise) -> str:
    """128x64x32-w4-s3: the block, its warps, its stages. Of a run 64, or 64xdx32 where its products are from memory."""
    if isinstance(tile, (SumTile, Elementwise)):
        return f"{tile.BLOCK_M}x{tile.BLOCK_N}-w{tile.warps}"
    if isinstance(tile, StackTile):
        block = f"{tile.BLOCK_M}xdx{tile.BLOCK_K}" if tile.BLOCK_K else f"{tile.BLOCK_M}"
    else:
        block = f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"
    parts = f"-p{tile.parts}" if isinstance(tile, PersistentTile) else ""
    return f"{block}-w{tile.warps}-s{tile.stages}{parts}"


class FormConfiguration(NamedTuple):
    """A layer's kernel of another form, and a tile that dispatch gives it in this mode: N, K of one such layer."""

    kernel: str
    mode: str
    N: int
    K: int
    keeps: bool  # forward: writes what backward reads; inside: more than a plain layer asks; statistics: of two halves
    tile: PersistentTile | StackTile | SplitTile | Elementwise

    def __str__(self) -> str:
        keeps = "-keeps" if self.keeps else ""
        return f"{self.kernel}-{self.mode}-{self.N}x{self.K}{keeps}-{name(self.tile)}"


@lru_cache(maxsize=8)
def every_plan(target: str, capability: int, gpu: str = "") -> list[tuple[plans.Facts, Plan]]:
    """What dispatch plans on a target (cuda, hip, interpreter), over all sizes up to 8193, and what was measured."""
    found = []
    for (mode, (dtype, precision)), N, K, skip in product(MODES.items(), SIZES, SIZES, SKIPS):
        if mode == "tf32" and target == "hip":  # dispatch has none there
            continue
        are_rows = N * dtype.itemsize % 16 == 0 == K * dtype.itemsize % 16
        fits = are_rows and dispatch.generation_of(target, capability) in plans.DESCRIBING
        for is_skinny, is_described in product((False, True), {False, fits}):
            for work in ("plain", "busy") if is_described else ("plain",):
                place = (skip, target, capability, gpu, is_skinny, False, is_described, True, work)
                facts = plans.Facts(N, K, dtype, precision, *place)
                found.append((facts, plans.plan_of(facts)))
    return found


def _pointer_tiles(plan: Plan) -> list[tuple[str, Tile]]:
    """(kernel, tile)."""
    forms = [("forward", plan.forward), ("forward", plan.training)]
    if isinstance(plan.backward, Separate):
        forms += [("dz", plan.backward.dz), ("dx", plan.backward.dx)]
    return [(kernel, form) for kernel, form in forms if isinstance(form, Tile)]


def shipped(target: str, capability: int, gpu: str = "") -> list[Configuration]:
    """Every configuration by pointers that dispatch chooses on a chip, and where `gpu` names it, measured ones."""
    found = {
        Configuration(kernel, facts.mode, facts.skip == "projection", facts.is_ragged, tile)
        for facts, plan in every_plan(target, capability if target == "cuda" else 0, gpu)
        for kernel, tile in _pointer_tiles(plan)
    }
    return sorted(found, key=lambda c: (KERNELS.index(c.kernel), list(MODES).index(c.mode), *c[2:]))


def shipped_forms(target: str, capability: int, gpu: str = "") -> list[FormConfiguration]:
    """Every other configuration, each on the widest layer that has it; where `gpu` names a chip, measured ones too."""
    found: dict[tuple, FormConfiguration] = {}
    for facts, plan in every_plan(target, capability, gpu):
        if facts.skip == "projection" or facts.is_ragged:
            continue
        forms: list[tuple[str, bool, object]] = [
            ("persistent", False, plan.forward),
            ("persistent", not facts.is_together, plan.training),
            ("weight", False, plan.weight),
        ]
        if isinstance(plan.backward, Inside):
            forms.append(("inside", facts.work == "busy", plan.backward.dx))
        if isinstance(plan.backward, Together):
            forms.append(("narrow", False, plan.backward.rows))
        for kernel, keeps, tile in forms:
            if tile is None or isinstance(tile, Tile):
                continue
            kernel = "finish" if isinstance(tile, Elementwise) else kernel
            widths = max(plans.padded(facts.N, facts.K)) if kernel == "narrow" else 0
            found[kernel, facts.mode, keeps, tile, widths] = FormConfiguration(
                kernel, facts.mode, min(facts.N, 1024), min(facts.K, 1024), keeps, tile
            )
    for mode in ("fp32", "bf16"):  # that sums are rounded to
        found["sums", mode] = FormConfiguration("sums", mode, 64, 64, False, Elementwise(64, 64, 4))
    return sorted(found.values(), key=lambda c: (FORMS.index(c.kernel), list(MODES).index(c.mode), *c[2:5]))


def shipped_stacks(target: str, capability: int) -> list[StackConfiguration]:
    """Every configuration of a run's kernels that dispatch chooses on a target."""
    generation = dispatch.generation_of(target, capability)
    found: dict[StackConfiguration, None] = {}
    for (mode, (dtype, precision)), width in product(MODES.items(), STACK_WIDTHS):
        for is_ragged, is_skinny in product((False, True), (False, True)):
            tiles = dispatch.stack_tiles(width - 3 * is_ragged, dtype, precision, generation, is_skinny)
            if tiles is None or (target == "hip" and mode == "tf32"):  # dispatch has no tf32 there
                continue
            found[StackConfiguration("stack_forward", mode, width, is_ragged, False, tiles.forward)] = None
            for sums_weight in (True, False):
                if dispatch.stack_sums_weight(1, width, 1) or not sums_weight:
                    c = StackConfiguration("stack_backward", mode, width, is_ragged, sums_weight, tiles.backward)
                    found[c] = None
    return list(found)


def largest(configurations: Iterable[Configuration]) -> list[Configuration]:
    """Of each kernel, mode and kind of layer, the one whose threads hold most."""

    def size(c: Configuration) -> tuple[int, int]:
        area = c.tile.BLOCK_M * c.tile.BLOCK_N
        return area // c.tile.warps, area * c.tile.BLOCK_K

    found: dict[tuple, Configuration] = {}
    for c in configurations:
        kind = c[:-1]
        found[kind] = max(found.get(kind, c), c, key=size)
    return list(found.values())


class Layer(NamedTuple):
    """A layer to run a kernel on: its options, and whether λ (one number) and a (one per channel) are learned."""

    spec: LayerSpec
    is_learned: bool = False
    has_residual: bool = False

    def operands(self, M: int, N: int, K: int, make: Callable[..., Tensor]) -> Operands:
        """Operands of these sizes; `make(name, *shape)` gives each tensor, a concatenated residual is K wide."""
        spec = self.spec
        return Operands(
            x=make("x", M, K),
            weight=make("weight", N, K),
            bias=make("bias", N),
            residual=make("residual", M, K if spec.skip == "concat" else N) if self.has_residual else None,
            projection_weight=make("projection_weight", N, K) if spec.skip == "projection" else None,
            projection_bias=make("projection_bias", N) if spec.skip == "projection" else None,
            skip_scale=make("skip_scale") if self.is_learned and spec.skip != "none" else None,
            branch_scale=make("branch_scale", N) if self.is_learned else None,
            seed=torch.tensor(2**62 + 2**31 + 1) if spec.drop_path > 0 else None,
        )


def everything(operands: Operands) -> Wanted:
    """All gradients that a layer with these operands has."""
    return Wanted(*(t is not None for t in operands[:-1]))


class Stack(NamedTuple):
    """A run of layers to run a kernel on: its options, and whether λ, a (per channel) and drop_path differ by layer."""

    activation: str = "gelu"
    order: str = "pre"
    has_skip: bool = True
    is_learned: bool = False
    drops: bool = False

    def run(self, L: int, d: int, make: Callable[..., Tensor]) -> Run:
        """Tensors of these sizes; `make(name, *shape)` gives each. Every other layer drops half of its rows."""
        run = Run(
            weight=make("weight", L, d, d),
            bias=make("bias", L, d),
            skip_scale=make("skip_scale", L) if self.is_learned and self.has_skip else 1.0,
            branch_scale=make("branch_scale", L, d) if self.is_learned else 2.0,
            activation=self.activation,
            order=self.order,
            has_skip=self.has_skip,
        )
        if not self.drops:
            return run
        device = run.weight.device
        drops = torch.arange(L, device=device) % 2
        return run._replace(
            seeds=torch.arange(L, device=device) + 2**62 + 2**31, threshold=drops << 31, keep_scale=1.0 + drops
        )

    def wanted(self) -> Wanted:
        return Wanted(True, True, True, False, False, False, self.is_learned and self.has_skip, self.is_learned)
