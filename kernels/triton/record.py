"""What is recorded of a gradient (`kernels/record.py`), from tiles that are in registers.

A program adds to rows [ROW] of its own in fp32, zeroed before, and torch adds up the programs' in their order. Sums are
in the unit of the largest number so far, a power of two: squares of vanishing gradients do not vanish themselves.
Sums are over all of a tile at once: one axis after the other, Triton 3.7 compiles none of them for sm_100.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..record import BRANCH, COUNT, LARGEST, OCTAVES, PRODUCT, ROW, SCALE, SKIP, SQUARES, SUM, ZEROS, Recording
from .launching import launch

_COUNT, _SUM, _SQUARES, _LARGEST, _ZEROS = (tl.constexpr(c) for c in (COUNT, SUM, SQUARES, LARGEST, ZEROS))
_BRANCH, _SKIP, _PRODUCT, _SCALE, _OCTAVES, _ROW = (
    tl.constexpr(c) for c in (BRANCH, SKIP, PRODUCT, SCALE, OCTAVES, ROW)
)
PROGRAMS = 16  # for each tensor
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def record(rows_ptr, row, unscale_ptr, total, skip, in_tile, HAS_SKIP: tl.constexpr):
    """Adds a tile of a gradient to a row; skip: the half of it that is not the branch's, a tile too where HAS_SKIP."""
    row_ptr = rows_ptr + tl.cast(row, tl.int64) * _ROW
    unscale = tl.load(unscale_ptr).to(tl.float32)
    total *= unscale
    octave = exponent(total)
    in_sum = in_tile & (octave < 255)
    zeros = tl.sum((in_sum & (total == 0)).to(tl.int32))
    total = tl.where(in_sum, total, 0.0)
    largest = _most(total)
    most = largest
    if HAS_SKIP:
        skip = tl.where(in_sum, skip * unscale, 0.0)
        branch = total - skip
        most = tl.maximum(most, tl.maximum(_most(skip), _most(branch)))

    # the unit: of what is there already, or of this tile
    before = tl.load(row_ptr + _SCALE)
    most_bits = most.to(tl.int32, bitcast=True) & 0x7F800000
    unit = tl.where(most > 0, tl.minimum(tl.maximum(most_bits.to(tl.float32, bitcast=True), 2.0**-120), 2.0**120), 0.0)
    unit = tl.maximum(before, unit)
    inverse = 1.0 / tl.where(unit > 0, unit, 1.0)
    kept = before * inverse
    total *= inverse
    _add(row_ptr + _SUM, tl.sum(tl.abs(total)), kept)
    _add(row_ptr + _SQUARES, tl.sum(total * total), kept * kept)
    if HAS_SKIP:
        branch *= inverse
        skip *= inverse
        _add(row_ptr + _BRANCH, tl.sum(branch * branch), kept * kept)
        _add(row_ptr + _SKIP, tl.sum(skip * skip), kept * kept)
        _add(row_ptr + _PRODUCT, tl.sum(branch * skip), kept * kept)
    tl.store(row_ptr + _SCALE, unit)

    # how many, how large
    inside = tl.sum(in_tile.to(tl.int32))
    _add(row_ptr + _COUNT, inside.to(tl.float32), 1.0)
    _add(row_ptr + _ZEROS, zeros.to(tl.float32), 1.0)
    tl.store(row_ptr + _LARGEST, tl.maximum(tl.load(row_ptr + _LARGEST), largest))
    e = tl.arange(0, 256)
    size: tl.constexpr = total.shape[0] * total.shape[1]
    octaves = tl.histogram(tl.reshape(tl.where(in_tile, octave, 0), (size,)), 256)
    octaves -= tl.where(e == 0, size - inside, 0)  # those outside the tile
    _add(row_ptr + _OCTAVES + e, octaves.to(tl.float32), 1.0)


@triton.jit
def exponent(value):
    """That of a float32, as its bits have it."""
    return (value.to(tl.int32, bitcast=True) >> 23) & 255


@triton.jit
def _most(value):
    return tl.max(tl.abs(value))


@triton.jit
def _add(ptr, value, kept):
    tl.store(ptr, tl.load(ptr) * kept + value)


@triton.jit
def _statistics_kernel(
    rows_ptr, addresses_ptr, unscale_ptr,
    ELEMENT: tl.constexpr, HAS_BRANCH: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    # place: this program's share of one tensor's numbers, some rows of 128 at a time
    tensor, program = tl.program_id(0) // PROGRAMS, tl.program_id(0) % PROGRAMS
    total_ptr = tl.load(addresses_ptr + 3 * tensor).to(tl.pointer_type(ELEMENT))
    branch_ptr = tl.load(addresses_ptr + 3 * tensor + 1).to(tl.pointer_type(ELEMENT))
    count = tl.load(addresses_ptr + 3 * tensor + 2)
    at = tl.arange(0, BLOCK_ROWS)[:, None].to(tl.int64) * 128 + tl.arange(0, 128)[None, :]
    for block in range(program, tl.cdiv(count, BLOCK_ROWS * 128), PROGRAMS):
        tl.debug_barrier()  # what the last turn has left in this program's row is there for all of its threads
        here = tl.cast(block, tl.int64) * (BLOCK_ROWS * 128) + at
        in_tile = here < count
        total = tl.load(total_ptr + here, mask=in_tile, other=0.0).to(tl.float32)
        skip = total
        if HAS_BRANCH:
            skip = total - tl.load(branch_ptr + here, mask=in_tile, other=0.0).to(tl.float32)
        record(rows_ptr, tl.program_id(0), unscale_ptr, total, skip, in_tile, HAS_BRANCH)


def statistics(totals: Sequence[Tensor], branches: Sequence[Tensor], unscale: float | Tensor) -> Tensor:
    """Parts [n, PROGRAMS, ROW] of n gradients of one dtype, and of the halves that came through branches, if any."""
    totals, branches = [[t.resolve_neg().contiguous() for t in some] for some in (totals, branches)]
    first = totals[0]
    facts = [(t.data_ptr(), branches[i].data_ptr() if branches else 0, t.numel()) for i, t in enumerate(totals)]
    addresses = torch.tensor(facts, dtype=torch.int64)
    if first.is_cuda:
        addresses = addresses.pin_memory().to(first.device, non_blocking=True)
    parts = fresh_rows(first, len(totals), PROGRAMS)
    compiled_for = {
        "ELEMENT": ELEMENTS[first.dtype], "HAS_BRANCH": bool(branches), "PROGRAMS": PROGRAMS, "BLOCK_ROWS": 16
    }  # fmt: skip
    launch(_statistics_kernel, len(totals) * PROGRAMS, (parts, addresses, factor(unscale, first)), compiled_for)
    return parts


def record_after(recording: Recording, dx: Tensor, skip: Tensor | None) -> None:
    """Of a gradient dx that some other kernel has written, and the half of it that came through the skip, if any."""
    total = dx.float()
    parts = statistics([total], [] if skip is None else [total - skip.float()], recording.unscale)
    recording.note(parts[0][:, None])


def fresh_rows(like: Tensor, programs: int, layers: int) -> Tensor:
    return torch.zeros(programs, layers, ROW, dtype=torch.float32, device=like.device)


def factor(unscale: float | Tensor, like: Tensor) -> Tensor:
    """What gradients are multiplied by, as a number in memory: [1] in fp32 on the device."""
    if isinstance(unscale, Tensor):
        return unscale.to(device=like.device, dtype=torch.float32).reshape(1)
    return torch.full((1,), unscale, dtype=torch.float32, device=like.device)
