"""Which of Triton's kernels run a layer, with which tiles: as measured on this GPU, else by a stated heuristic.

A choice depends on N, K, the dtype and a coarse class of M, at most SKINNY rows or more, so that within a class a row's
bits do not depend on the batch around it, and no new batch size compiles anything. Where the vendor's library
multiplies it may choose by M: within `batch_invariant()` it is not asked to. How operands lie in memory decides where
the copy engine cannot take them. Nothing is tuned at a call: `python bench/tune.py` measures.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import measured
from .dispatch import SKINNY, Triton, precision
from .kernels.config import (
    Elementwise,
    Inside,
    PersistentTile,
    Plan,
    Separate,
    SplitTile,
    StackTile,
    Tile,
    Together,
)
from .kernels.spec import LayerSpec, Operands

TOGETHER_UP_TO = 128  # N and K, up to which all of backward may be one kernel, and x all that is kept
WHOLE_UP_TO = 256  # N and K, up to which w stays in a program's shared memory
TILED_UP_TO = 2048  # K, up to which finishing a tile is worth hiding behind another's product
INSIDE_UP_TO = 1024  # K, up to which dz is made in the product for dx: each tile across makes it again
LIBRARY_FROM = 128  # N and K of exact fp32, which has no matrix unit, from which the library multiplies


class Facts(NamedTuple):
    """All that a choice hangs on."""

    N: int
    K: int
    dtype: torch.dtype
    precision: str
    skip: str
    target: str
    capability: int
    gpu: str
    is_skinny: bool
    is_invariant: bool  # a row's bits may not depend on M, as the library's do
    is_described: bool  # the copy engine takes every operand, all of one dtype
    trusts_registers: bool  # as the choice of backend has it
    work: str  # of backward, per number: "plain", "busy", or "apart", what only a dz kernel of its own does

    @property
    def is_exact_fp32(self) -> bool:
        return self.dtype == torch.float32 and self.precision == "ieee"

    @property
    def is_ragged(self) -> bool:
        return self.N % 16 != 0 or self.K % 16 != 0

    @property
    def mode(self) -> str:
        return mode(self.dtype, self.precision)

    @property
    def is_together(self) -> bool:
        choice = Triton("", self.target, self.capability, self.gpu)
        return _is_together(self.N, self.K, self.skip, self.mode, choice)


def layer_plan(
    operands: Operands, spec: LayerSpec, choice: Triton, dtype: torch.dtype, g: Tensor | None = None
) -> Plan:
    """The plan of a layer x [..., K] -> [..., N] computing in dtype; for its backward with g = ∂L/∂y."""
    N, K = operands.weight.shape
    M = operands.x.shape[:-1].numel()
    facts = Facts(
        N,
        K,
        dtype,
        precision(dtype),
        spec.skip,
        choice.target,
        choice.capability,
        choice.gpu,
        is_skinny=M <= SKINNY and not spec.batch_invariant,
        is_invariant=spec.batch_invariant,
        is_described=choice.capability >= 90 and _is_described(operands, g, dtype),
        trusts_registers=choice.trusts_registers,
        work=_work(operands, spec),
    )
    plan = plan_of(facts)
    if plan.weight is None:
        return plan
    splits = min(plan.weight.splits, -(-M // (2 * plan.weight.BLOCK_M)))  # two steps to a share at least
    return plan._replace(weight=plan.weight._replace(splits=splits))


def _work(operands: Operands, spec: LayerSpec) -> str:
    learns = operands.branch_scale is not None or operands.skip_scale is not None
    multiplies = spec.recompute and spec.activation != "none"
    writes_ds = spec.activates_sum and spec.skip == "residual"
    if multiplies or writes_ds or (spec.activates_sum and operands.branch_scale is not None):
        return "apart"
    return "busy" if learns or spec.activates_sum or spec.drop_path > 0 else "plain"


def keeps_input_alone(operands: Operands, spec: LayerSpec, choice: Triton) -> bool:
    """Whether forward keeps nothing but x: by shapes and dtype alone, so that a traced call knows it too."""
    N, K = map(int, operands.weight.shape)  # where they are symbols, a trace is for these
    dtype = operands.x.dtype
    return _is_together(N, K, spec.skip, mode(dtype, precision(dtype)), choice)


def mode(dtype: torch.dtype, precision: str) -> str:
    """What a measured plan is for: fp32, which is exact, tf32, fp16 or bf16."""
    if dtype == torch.float32:
        return "tf32" if precision == "tf32" else "fp32"
    return "fp16" if dtype == torch.float16 else "bf16"


@lru_cache(maxsize=4096)
def plan_of(facts: Facts) -> Plan:
    """The measured plan, as far as these facts admit its forms; a heuristic one for the rest."""
    plan = _heuristic(facts)
    found = measured.plan(facts.gpu, facts.N, facts.K, facts.mode, facts.is_skinny)
    forms = {} if found is None else found._asdict()
    plan = plan._replace(**{name: form for name, form in forms.items() if _admits(facts, form)})
    if isinstance(plan.backward, Inside) and facts.work == "busy":
        plan = plan._replace(backward=INSIDE_BUSY)
    if found is None or plan == found:
        return plan
    return plan._replace(because=f"{found.because}, where those forms fit; the others reasoned")


def _admits(facts: Facts, form: object) -> bool:
    is_plain = facts.skip in ("none", "identity", "residual")
    if isinstance(form, PersistentTile):
        is_whole = form.BLOCK_N >= facts.N and form.BLOCK_K >= facts.K
        return is_plain and facts.is_described and not (is_whole and facts.skip == "residual")
    if isinstance(form, Elementwise):
        return facts.skip != "concat" and not facts.is_invariant
    if isinstance(form, Inside):
        return (
            is_plain
            and facts.is_described
            and facts.trusts_registers
            and facts.work != "apart"
            and not facts.is_together
        )
    if isinstance(form, Separate) and form.dx is None and facts.is_invariant:
        return False
    if isinstance(form, (Together, Separate)):
        return isinstance(form, Together) == facts.is_together
    return not isinstance(form, SplitTile) or facts.is_described or not form.by_descriptors


def _is_together(N: int, K: int, skip: str, mode: str, choice: Triton) -> bool:
    if max(N, K) > TOGETHER_UP_TO or skip not in ("none", "identity", "residual"):
        return False
    if _rows_together(N, K, mode, choice.target, choice.capability) is None:
        return False
    found = measured.plan(choice.gpu, N, K, mode, False)
    return found is None or isinstance(found.backward, Together)


def _rows_together(N: int, K: int, mode: str, target: str, capability: int) -> StackTile | None:
    """The tile of the one kernel, None where there is none that does not spill."""
    kind = {"fp32": "exact", "tf32": "tf32"}.get(mode, "half")
    key = kind, max(padded(N, K))
    if target == "hip":  # reasoned: what spills nothing there, padded or not
        return TOGETHER[key] if key in (("half", 16), ("half", 32), ("exact", 16)) else None
    if target == "cuda" and capability < 90:
        return None if key == ("tf32", 128) else SMALLER.get(key, TOGETHER.get(key))
    return TOGETHER.get(key)


def _is_described(operands: Operands, g: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether all are of one dtype and lie as the copy engine wants them, rows at multiples of 16 bytes."""
    is_residual_read = g is None or operands.skip_scale is not None  # backward has let go of one that it does not read
    residual = operands.residual if is_residual_read else None
    given = [t for t in (operands.x, operands.weight, residual) if t is not None]
    if any(t.dtype != dtype for t in given) or (g is not None and g.dtype != dtype):
        return False
    return all(_is_row(size * dtype.itemsize) for size in operands.weight.shape) and all(map(_lies_well, given))


def _lies_well(t: Tensor) -> bool:
    if t.dim() > 2 and not t.is_contiguous():  # as a matrix it may be a view or a copy
        return False
    return t.stride(-1) == 1 and (t.dim() < 2 or _is_row(t.stride(-2) * t.itemsize)) and t.data_ptr() % 16 == 0


def _is_row(size: int) -> bool:
    return size > 0 and size % 16 == 0


# ---------------------------------------------------------------------------------------------- the heuristic


def _heuristic(facts: Facts) -> Plan:
    """Reasoned, not measured: the largest tiles that do not spill (`python bench/lens.py`), by the bytes they move."""
    keeps = not facts.is_together
    return Plan(_forward(facts, False), _forward(facts, keeps), _backward(facts), None)


def _forward(facts: Facts, keeps: bool) -> Tile | PersistentTile | Elementwise:
    if _takes_library(facts):
        return ELEMENTWISE
    if facts.is_skinny or facts.dtype == torch.float32 or facts.skip in ("projection", "concat"):
        return _tile(facts, facts.N, facts.K, "forward")
    if not facts.is_described:
        return _tile(facts, facts.N, facts.K, "forward")
    widest = max(facts.N, facts.K)
    whole = WHOLE[_power_of_two(widest, 64, WHOLE_UP_TO)]
    if widest <= whole.BLOCK_N and not (keeps and widest > TOGETHER_UP_TO) and _admits(facts, whole):
        return whole
    return TILED if facts.K <= TILED_UP_TO else TILED_DEEP


def _backward(facts: Facts) -> Separate | Inside | Together:
    if facts.is_together:
        rows = _rows_together(facts.N, facts.K, facts.mode, facts.target, facts.capability)
        return Together(rows._replace(BLOCK_M=16) if facts.is_skinny else rows)
    dz = _tile(facts, facts.N, facts.K, "dz")
    by_library, in_pieces = Separate(dz, None), Separate(dz, _tile(facts, facts.K, facts.N, "dx"))
    if _takes_library(facts):
        return by_library
    if facts.is_skinny or facts.dtype.itemsize > 2:
        return in_pieces
    if facts.K <= INSIDE_UP_TO:
        return INSIDE if _admits(facts, INSIDE) else in_pieces
    return by_library if facts.is_described and _admits(facts, by_library) else in_pieces


def _takes_library(facts: Facts) -> bool:
    """Exact fp32 has no matrix unit: there the library's products are the better ones, and a pass is little to them."""
    is_large = min(facts.N, facts.K) >= LIBRARY_FROM and not facts.is_skinny
    return facts.is_exact_fp32 and is_large and facts.target != "hip" and _admits(facts, ELEMENTWISE)


ELEMENTWISE = Elementwise(32, 128, 4)
# w in shared memory, by the width that N and K are padded to; a multiprocessor has as many programs as its memory takes
WHOLE = {
    64: PersistentTile(64, 64, 64, 4, 4, parts=1, residents=4),
    128: PersistentTile(64, 128, 128, 4, 3, parts=2, residents=2),
    256: PersistentTile(64, 256, 256, 8, 2, parts=1, residents=1),
}
# two programs to a multiprocessor: one finishes a tile while the other multiplies; deep ones have little to finish
TILED = PersistentTile(128, 128, 64, 4, 3, parts=4, residents=2)
TILED_DEEP = PersistentTile(128, 256, 64, 8, 3, parts=4)
INSIDE = Inside(PersistentTile(128, 256, 32, 8, 4, parts=2))
INSIDE_BUSY = Inside(PersistentTile(64, 256, 32, 8, 4, parts=2))  # for layers that do more to each number
# rows per program of the kernel that is all of backward; exact fp32 holds no wider dw in its registers
TOGETHER = {
    ("half", 16): StackTile(128, 4, 3),
    ("half", 32): StackTile(64, 4, 3),
    ("half", 64): StackTile(32, 4, 3),
    ("half", 128): StackTile(32, 8, 3),
    ("tf32", 16): StackTile(64, 4, 3),
    ("tf32", 32): StackTile(64, 8, 3),
    ("tf32", 64): StackTile(32, 4, 2),
    ("tf32", 128): StackTile(16, 8, 2),
    ("exact", 16): StackTile(64, 8, 2),
    ("exact", 32): StackTile(64, 8, 2),
    ("exact", 64): StackTile(32, 8, 2),
}
SMALLER = {("half", 128): StackTile(16, 8, 2)}  # where a program has 99 KiB of shared memory, before sm_90


class _Shape(NamedTuple):
    """The largest tile by pointers, in 4-byte elements along the depth."""

    rows: int
    columns: int
    depth: int
    warps: int


# fp32 without tf32 has no matrix unit and holds its operands in registers too; sizes that are no multiple of 16 load
# element by element, with an address each (128 x 128 x 64 would spill 512 bytes on sm_90).
_SHAPES = {  # (is_exact_fp32, is_ragged, work); forward has φ and φ' of a tile at once, a projection two products
    (False, False, "forward"): _Shape(128, 64, 32, 8),
    (False, False, "projected forward"): _Shape(64, 64, 32, 8),
    (False, False, "dz"): _Shape(128, 64, 32, 8),
    (False, False, "dx"): _Shape(128, 128, 32, 8),
    (False, False, "projected dx"): _Shape(128, 64, 32, 8),
    (False, True, "forward"): _Shape(64, 64, 32, 8),
    (False, True, "projected forward"): _Shape(64, 32, 32, 8),
    (False, True, "dz"): _Shape(64, 64, 32, 8),
    (False, True, "dx"): _Shape(64, 64, 32, 8),
    (False, True, "projected dx"): _Shape(64, 32, 32, 8),
    (True, False, "forward"): _Shape(64, 64, 16, 8),
    (True, False, "projected forward"): _Shape(32, 32, 16, 8),
    (True, False, "dz"): _Shape(64, 64, 16, 8),
    (True, False, "dx"): _Shape(64, 64, 16, 4),
    (True, False, "projected dx"): _Shape(64, 32, 16, 8),
    (True, True, "forward"): _Shape(64, 64, 16, 8),
    (True, True, "projected forward"): _Shape(64, 32, 16, 8),
    (True, True, "dz"): _Shape(64, 32, 16, 8),
    (True, True, "dx"): _Shape(64, 64, 16, 8),
    (True, True, "projected dx"): _Shape(64, 32, 16, 8),
}
_SKINNY = {False: _Shape(16, 64, 32, 4), True: _Shape(16, 64, 16, 4)}  # by is_exact_fp32


def _tile(facts: Facts, columns: int, depth: int, work: str) -> Tile:
    """By pointers, for an output of so many columns and products of this depth."""
    if work != "dz" and facts.skip == "projection":
        work = f"projected {work}"
    is_half = facts.dtype.itemsize == 2
    shape = _SKINNY[facts.is_exact_fp32] if facts.is_skinny else _SHAPES[facts.is_exact_fp32, facts.is_ragged, work]
    deepest = 2 * shape.depth if is_half and not facts.is_ragged else shape.depth
    block_n = _power_of_two(columns, 16, shape.columns)
    block_k = _power_of_two(depth, 32 if is_half else 16, deepest)
    return Tile(shape.rows, block_n, block_k, shape.warps, 2 if facts.target == "hip" else 3)


def padded(N: int, K: int) -> tuple[int, int]:
    """The powers of two that a narrow layer's widths are padded to: products have no fewer than 16 columns."""
    return _power_of_two(N, 16, TOGETHER_UP_TO), _power_of_two(K, 16, TOGETHER_UP_TO)


def _power_of_two(size: int, smallest: int, largest: int) -> int:
    return min(largest, max(smallest, 1 << (size - 1).bit_length()))
