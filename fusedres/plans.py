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
from .dispatch import SKINNY, Triton, generation_of, precision, prefers_kernels
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

DESCRIBING = ("hopper", "blackwell")  # whose copy engine takes tiles, and whose shared memory has room for many
TOGETHER_UP_TO = 128  # N and K, up to which all of backward may be one kernel, and x all that is kept
WHOLE_UP_TO = 256  # N and K, up to which w stays in a program's shared memory
TILED_UP_TO = 2048  # K, up to which finishing a tile is worth hiding behind another's product
INSIDE_UP_TO = 1024  # K, up to which dz is made in the product for dx: each tile across makes it again
LIBRARY_FROM = 128  # N and K of exact fp32, which has no matrix unit, from which the library multiplies


class Because(NamedTuple):
    """Why each part of a plan is what it is."""

    forward: str
    training: str
    backward: str
    weight: str


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
    def generation(self) -> str:
        return generation_of(self.target, self.capability)

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
    return explained(operands, spec, choice, dtype, g)[0]


def explained(
    operands: Operands, spec: LayerSpec, choice: Triton, dtype: torch.dtype, g: Tensor | None = None
) -> tuple[Plan, Because]:
    """The same with its reasons."""
    weight = operands.weight
    M = operands.x.shape[:-1].numel()
    is_skinny = M <= SKINNY and not spec.batch_invariant
    # few rows are not worth descriptors, which take the host longer than their tile is quicker
    is_described = choice.generation in DESCRIBING and not is_skinny and _is_described(operands, g, dtype)
    learns = (operands.skip_scale is not None, operands.branch_scale is not None)
    plan, because = _explained(weight.shape, dtype, precision(dtype), spec, learns, choice, is_skinny, is_described)
    if plan.weight is not None:
        splits = min(plan.weight.splits, -(-M // (2 * plan.weight.BLOCK_M)))  # two steps to a share at least
        plan = plan._replace(weight=plan.weight._replace(splits=splits))
    return plan, because


@lru_cache(maxsize=4096)
def _explained(
    shape: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    spec: LayerSpec,
    learns: tuple[bool, bool],
    choice: Triton,
    is_skinny: bool,
    is_described: bool,
) -> tuple[Plan, Because]:
    """By what a call knows of itself, learns being whether λ and a are learned; it costs it a look into a table."""
    N, K = shape
    facts = Facts(
        N,
        K,
        dtype,
        precision,
        spec.skip,
        choice.target,
        choice.capability,
        choice.gpu,
        is_skinny,
        is_invariant=spec.batch_invariant,
        is_described=is_described,
        trusts_registers=choice.trusts_registers,
        work=_work(spec, *learns),
    )
    return explained_of(facts)


def _work(spec: LayerSpec, learns_skip_scale: bool, learns_branch_scale: bool) -> str:
    multiplies = spec.recompute and spec.activation != "none"
    writes_ds = spec.activates_sum and spec.skip == "residual"
    if multiplies or writes_ds or (spec.activates_sum and learns_branch_scale):
        return "apart"
    is_busy = learns_skip_scale or learns_branch_scale or spec.activates_sum or spec.drop_path > 0
    return "busy" if is_busy else "plain"


def forget() -> None:
    """What was decided, so that it is decided again: tests and tuning change what is measured."""
    _explained.cache_clear()
    explained_of.cache_clear()


def keeps_input_alone(operands: Operands, spec: LayerSpec, choice: Triton) -> bool:
    """Whether forward keeps nothing but x: by shapes and dtype alone, so that a traced call knows it too."""
    N, K = map(int, operands.weight.shape)  # where they are symbols, a trace is for these
    dtype = operands.x.dtype
    return _is_together(N, K, spec.skip, mode(dtype, precision(dtype)), choice)


def may_be_eager(choice: Triton) -> bool:
    """Whether eager PyTorch was measured faster for any layer at all. Reads a file: not for torch.compile to trace."""
    return measured.has_eager(choice.gpu)


def why_eager(operands: Operands, spec: LayerSpec, choice: Triton, trains: bool) -> str:
    """Where eager PyTorch was measured faster for this layer's size, as a call or a step of training: the times.

    Measured on y = x + gelu(x wᵀ + b), and taken for layers that do no more: the rest eager does in kernels of their
    own. Empty within `batch_invariant()`, of which eager PyTorch knows nothing, and while a graph is captured that
    `warmup` has made ready, since it leaves out what the host takes.
    """
    is_plain = spec.skip in ("none", "identity", "residual") and not spec.activates_sum and spec.drop_path == 0
    learns = operands.skip_scale is not None or operands.branch_scale is not None
    is_scaled = learns or spec.skip_scale != 1.0 or spec.branch_scale != 1.0
    if is_scaled or not is_plain or spec.recompute or spec.batch_invariant or spec.watch:
        return ""
    if prefers_kernels(operands.x.device):
        return ""
    N, K = operands.weight.shape
    dtype = operands.x.dtype
    is_skinny = operands.x.shape[:-1].numel() <= SKINNY
    found = measured.plan(choice.gpu, N, K, mode(dtype, precision(dtype)), is_skinny)
    times = None if found is None else found.eager.get("training" if trains else "forward")
    return f"{found.because}: {times}" if times else ""


def mode(dtype: torch.dtype, precision: str) -> str:
    """What a measured plan is for: fp32, which is exact, tf32, fp16 or bf16."""
    if dtype == torch.float32:
        return "tf32" if precision == "tf32" else "fp32"
    return "fp16" if dtype == torch.float16 else "bf16"


def plan_of(facts: Facts) -> Plan:
    """The measured plan, as far as these facts admit its forms; a heuristic one for the rest."""
    return explained_of(facts)[0]


@lru_cache(maxsize=4096)
def explained_of(facts: Facts) -> tuple[Plan, Because]:
    """The same with its reasons."""
    plan, reasons = heuristic(facts)
    found = measured.plan(facts.gpu, facts.N, facts.K, facts.mode, facts.is_skinny)
    if found is None:
        return plan, Because(*(f"reasoned, not measured: {reason}" for reason in reasons))
    forms, because = plan._asdict(), {}
    for part, form in found.plan._asdict().items():
        if refused := why_not(facts, form):
            because[part] = f"reasoned: {getattr(reasons, part)}; what was measured does not fit: {refused}"
        elif isinstance(form, Inside) and facts.work == "busy":
            forms[part], because[part] = INSIDE_BUSY, f"{found.because}, with the tile of layers that do more"
        else:
            forms[part], because[part] = form, found.because
    return Plan(**forms), Because(**because)


def why_not(facts: Facts, form: object) -> str:
    """Why a layer cannot have a form; empty where it can."""
    if isinstance(form, (PersistentTile, Inside)):
        if facts.skip in ("projection", "concat"):
            return f"descriptors are for a skip of one matrix of y's shape, and this is a {facts.skip}"
        if not facts.is_described:
            return _why_not_described(facts)
    if isinstance(form, PersistentTile):
        is_whole = form.BLOCK_N >= facts.N and form.BLOCK_K >= facts.K
        return "a tile of a residual has no room beside all of w" if is_whole and facts.skip == "residual" else ""
    if isinstance(form, Elementwise):
        return "the library has nowhere to leave a concatenation" if facts.skip == "concat" else _varies(facts)
    if isinstance(form, Inside):
        if not facts.trusts_registers:
            return "ptxas before 13.3 has not passed the sweep of operands in registers on this GPU"
        if facts.work == "apart":
            return "what backward does for each number takes a kernel of its own"
        return "forward keeps x alone" if facts.is_together else ""
    if isinstance(form, Together):
        return "" if facts.is_together else "forward keeps what backward in pieces reads"
    if isinstance(form, Separate) and facts.is_together:
        return "forward keeps x alone"
    if isinstance(form, Separate):
        return _varies(facts) if form.dx is None else ""
    is_described = facts.is_described or not (isinstance(form, SplitTile) and form.by_descriptors)
    return "" if is_described else _why_not_described(facts)


def _why_not_described(facts: Facts) -> str:
    if facts.target == "interpreter":
        return "the interpreter goes by pointers"
    if facts.generation not in DESCRIBING:
        return "this GPU copies no tiles by descriptors"
    if facts.is_skinny:
        return FEW
    return "an operand is of another dtype, or its rows do not begin at multiples of 16 bytes"


def _varies(facts: Facts) -> str:
    return "a row's bits may not depend on the batch, and the library's do" if facts.is_invariant else ""


def _is_together(N: int, K: int, skip: str, mode: str, choice: Triton) -> bool:
    if max(N, K) > TOGETHER_UP_TO or skip not in ("none", "identity", "residual"):
        return False
    if _rows_together(N, K, mode, choice.generation) is None:
        return False
    found = measured.plan(choice.gpu, N, K, mode, False)
    return found is None or isinstance(found.plan.backward, Together)


def _rows_together(N: int, K: int, mode: str, generation: str) -> StackTile | None:
    """The tile of the one kernel, None where there is none that does not spill."""
    kind = {"fp32": "exact", "tf32": "tf32"}.get(mode, "half")
    key = kind, max(padded(N, K))
    if generation == "hip":  # reasoned: what spills nothing there, padded or not
        return TOGETHER[key] if key in (("half", 16), ("half", 32), ("exact", 16)) else None
    return TOGETHER_ELSEWHERE.get(generation, {}).get(key, TOGETHER.get(key))


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


def heuristic(facts: Facts) -> tuple[Plan, Because]:
    """Reasoned, not measured: the largest tiles that do not spill (`python bench/lens.py`), by the bytes they move."""
    (forward, why), (training, why_training) = (_forward(facts, keeps) for keeps in (False, not facts.is_together))
    backward, why_backward = _backward(facts)
    why_weight = "it sums dw itself" if facts.is_together else "the library's products over rows are hard to beat"
    return Plan(forward, training, backward, None), Because(why, why_training, why_backward, why_weight)


def _forward(facts: Facts, keeps: bool) -> tuple[Tile | PersistentTile | Elementwise, str]:
    if _takes_library(facts):
        return ELEMENTWISE, LIBRARY
    by_pointers = _tile(facts, facts.N, facts.K, "forward")
    if facts.is_skinny:
        return by_pointers, FEW
    if facts.dtype == torch.float32:
        return by_pointers, "tiles by descriptors are laid out for 16 bits"
    if facts.skip in ("projection", "concat") or not facts.is_described:
        return by_pointers, why_not(facts, TILED)
    widest, whole = max(facts.N, facts.K), whole_tile(facts)
    if widest <= whole.BLOCK_N and not (keeps and widest > TOGETHER_UP_TO) and not why_not(facts, whole):
        return whole, "all of w stays in a program's shared memory"
    if facts.K <= TILED_UP_TO:
        return TILED, "one of two programs finishes a tile while the other multiplies"
    return TILED_DEEP, f"above K = {TILED_UP_TO} there is little to finish, and larger tiles read less"


def whole_tile(facts: Facts) -> PersistentTile:
    """The tile with all of w in shared memory, for layers up to WHOLE_UP_TO."""
    tiles = WHOLE | BLACKWELL_WHOLE if facts.generation == "blackwell" else WHOLE
    return tiles[_power_of_two(max(facts.N, facts.K), 64, WHOLE_UP_TO)]


def _backward(facts: Facts) -> tuple[Separate | Inside | Together, str]:
    if facts.is_together:
        rows = _rows_together(facts.N, facts.K, facts.mode, facts.generation)
        one = Together(rows._replace(BLOCK_M=16) if facts.is_skinny else rows)
        return one, "one kernel reads x and ∂L/∂y once, and has room for dw in its registers"
    dz = _tile(facts, facts.N, facts.K, "dz")
    by_library, in_pieces = Separate(dz, None), Separate(dz, _tile(facts, facts.K, facts.N, "dx"))
    if _takes_library(facts):
        return by_library, LIBRARY
    if facts.is_skinny:
        return in_pieces, FEW
    if facts.dtype.itemsize > 2:
        return in_pieces, "dz inside the product for dx is laid out for 16 bits"
    if facts.K <= INSIDE_UP_TO:
        inside = BLACKWELL_INSIDE if facts.generation == "blackwell" else INSIDE
        refused, inside = why_not(facts, inside), INSIDE_BUSY if facts.work == "busy" else inside
        return (in_pieces, refused) if refused else (inside, "dz is made where dx reads it, and written once for dw")
    if not facts.is_described:
        return in_pieces, f"by pointers until measured otherwise: {_why_not_described(facts)}"
    refused = why_not(facts, by_library)
    why = f"above K = {INSIDE_UP_TO} each tile across would make dz again, and the library multiplies well"
    return (in_pieces, refused) if refused else (by_library, why)


def _takes_library(facts: Facts) -> bool:
    """Exact fp32 has no matrix unit: there the library's products are the better ones, and a pass is little to them."""
    is_large = min(facts.N, facts.K) >= LIBRARY_FROM and not facts.is_skinny
    return facts.is_exact_fp32 and is_large and facts.target != "hip" and not why_not(facts, ELEMENTWISE)


LIBRARY = "exact float32 has no matrix unit: the library's products are better, and a pass is little beside them"
FEW = f"up to {SKINNY} rows read w rather than x, in low tiles"

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
# where those would spill, or take more shared memory or registers than there are
BLACKWELL_WHOLE = {64: WHOLE[64]._replace(residents=3), 256: WHOLE[256]._replace(parts=2)}
BLACKWELL_INSIDE = Inside(PersistentTile(128, 256, 32, 8, 3, parts=2))
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
TOGETHER_ELSEWHERE: dict[str, dict[tuple[str, int], StackTile | None]] = {  # where those would spill or have no room
    "ampere": {("half", 16): StackTile(64, 4, 3), ("half", 128): StackTile(16, 8, 2), ("tf32", 128): None},
    "blackwell": {("half", 16): StackTile(64, 4, 3), ("tf32", 16): StackTile(64, 4, 2)},
}


class _Shape(NamedTuple):
    """The largest tile by pointers, in 4-byte elements along the depth."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int = 3


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
_AMPERE_TF32 = _Shape(128, 64, 16, 8, stages=4)  # forward, where sin's slow path would spill
_SKINNY = {False: _Shape(16, 64, 32, 4), True: _Shape(16, 64, 16, 4)}  # by is_exact_fp32


def _tile(facts: Facts, columns: int, depth: int, work: str) -> Tile:
    """By pointers, for an output of so many columns and products of this depth."""
    if work != "dz" and facts.skip == "projection":
        work = f"projected {work}"
    is_half = facts.dtype.itemsize == 2
    shape = _SKINNY[facts.is_exact_fp32] if facts.is_skinny else _SHAPES[facts.is_exact_fp32, facts.is_ragged, work]
    is_ampere_tf32 = facts.generation == "ampere" and facts.mode == "tf32" and not facts.is_ragged
    if is_ampere_tf32 and work == "forward" and not facts.is_skinny:
        shape = _AMPERE_TF32
    deepest = 2 * shape.depth if is_half and not facts.is_ragged else shape.depth
    block_n = _power_of_two(columns, 16, shape.columns)
    block_k = _power_of_two(depth, 32 if is_half else 16, deepest)
    return Tile(shape.rows, block_n, block_k, shape.warps, 2 if facts.target == "hip" else shape.stages)


def padded(N: int, K: int) -> tuple[int, int]:
    """The powers of two that a narrow layer's widths are padded to: products have no fewer than 16 columns."""
    return _power_of_two(N, 16, TOGETHER_UP_TO), _power_of_two(K, 16, TOGETHER_UP_TO)


def _power_of_two(size: int, smallest: int, largest: int) -> int:
    return min(largest, max(smallest, 1 << (size - 1).bit_length()))
