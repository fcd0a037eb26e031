"""Sums over rows that programs have left in parts, added in one order and rounded once; all of a layer's in one launch.

out_i = Σ_r part_i[r, :]        part_i [rows, n_i] fp32        out_i [n_i], or one number, Σ over columns too
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..spec import Operands
from .launching import cdiv, launch

SIDE_BY_SIDE, BLOCK = 64, 64  # rows and columns that a program adds at a time


@triton.jit(do_not_specialize=["rows"])
def _add_kernel(
    out0, part0, n0, out1, part1, n1, out2, part2, n2, out3, part3, n3, out4, part4, n4, rows,
    SHARES: tl.constexpr, BLOCK: tl.constexpr, TOTALS: tl.constexpr,
):  # fmt: skip
    # place: this program owns a block of columns of one of the sums, or all of a total
    block = tl.program_id(0)
    block = add(out0, part0, n0, rows, block, SHARES, BLOCK, TOTALS & 1)
    block = add(out1, part1, n1, rows, block, SHARES, BLOCK, TOTALS & 2)
    block = add(out2, part2, n2, rows, block, SHARES, BLOCK, TOTALS & 4)
    block = add(out3, part3, n3, rows, block, SHARES, BLOCK, TOTALS & 8)
    add(out4, part4, n4, rows, block, SHARES, BLOCK, TOTALS & 16)


@triton.jit
def add(
    out_ptr, part_ptr, n, rows, block, SHARES: tl.constexpr, BLOCK: tl.constexpr, IS_TOTAL: tl.constexpr
):  # fmt: skip
    """The sum's block where it is one of its own; the block's place among the sums that follow."""
    if out_ptr is None:
        return block
    else:
        blocks = 1 if IS_TOTAL else tl.cdiv(n, BLOCK)
        if (block >= 0) & (block < blocks):
            if IS_TOTAL:
                total = tl.zeros((), tl.float32)
                for first in range(0, n, BLOCK):
                    total += tl.sum(column_sums(part_ptr, n, rows, first, SHARES, BLOCK), axis=0)
                tl.store(out_ptr, total.to(out_ptr.dtype.element_ty))
            else:
                i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
                found = column_sums(part_ptr, n, rows, block.to(tl.int64) * BLOCK, SHARES, BLOCK)
                tl.store(out_ptr + i, found.to(out_ptr.dtype.element_ty), mask=i < n)
        return block - blocks


@triton.jit
def column_sums(part_ptr, n, rows, first, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    """Of columns first, …: SHARES rows side by side, and these at the end."""
    i = first + tl.arange(0, BLOCK).to(tl.int64)
    r = tl.arange(0, SHARES)
    part = part_ptr + r[:, None].to(tl.int64) * n + i[None, :]
    total = tl.zeros((SHARES, BLOCK), tl.float32)
    for r0 in range(0, rows, SHARES):
        total += tl.load(part, mask=(r < rows - r0)[:, None] & (i < n)[None, :], other=0.0)
        part += tl.cast(SHARES, tl.int64) * n
    return tl.sum(total, axis=0)


def add_rows(parts: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Σ over rows of up to five parts [rows, …], as many rows of each, into dense tensors; of one number the total."""
    rows = parts[0].shape[0] if parts else 0
    if rows == 0:
        for out in into:
            out.zero_()
        return
    columns = [part.numel() // rows for part in parts]
    are_totals = [out.numel() == 1 for out in into]
    blocks = sum(1 if is_total else cdiv(n, BLOCK) for n, is_total in zip(columns, are_totals, strict=True))
    sections = [*zip(into, parts, columns, strict=True), *[(None, None, 0)] * (5 - len(parts))]
    totals = sum(is_total << i for i, is_total in enumerate(are_totals))
    compiled_for = {"SHARES": SIDE_BY_SIDE, "BLOCK": BLOCK, "TOTALS": totals, "num_warps": 4}
    launch(_add_kernel, blocks, (*(value for section in sections for value in section), rows), compiled_for)


def added(parts: dict[str, Tensor], operands: Operands) -> dict[str, Tensor]:
    """The gradients of the operands whose parts these are, each in memory of its own: shared, it would be in one file
    when one of them is saved."""
    into = {name: getattr(operands, name) for name in parts}
    into = {name: t.new_empty(t.shape) for name, t in into.items()}
    add_rows(list(parts.values()), list(into.values()))
    return into
