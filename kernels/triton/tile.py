"""What every kernel here does with a tile: place it, multiply into it, load and store it at its edges.

Row and column indices are int64, so that no offset wraps, whatever the sizes.
"""

import triton
import triton.language as tl


@triton.jit
def place(M, N, first, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows m, columns n of this program, with masks; first is the first program of this grid of tiles.

    Neighbours share their rows, so that the operand with many rows is read from memory once.
    """
    column_tile = (tl.program_id(0) - first) % tl.cdiv(N, BLOCK_N)
    m = row_tile(N, first, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, n, m < M, n < N


@triton.jit
def row_tile(N, first, BLOCK_N: tl.constexpr):
    """Which tile of rows this program owns, int64."""
    return ((tl.program_id(0) - first) // tl.cdiv(N, BLOCK_N)).to(tl.int64)


@triton.jit
def product(
    a_ptr, stride_am, b_ptr, stride_bn, stride_bk, m, n, in_m, in_n, K, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """Σ_k a[m, k] b[n, k] in fp32; a has unit inner stride, b has any."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    a_tile = a_ptr + m[:, None] * stride_am + k[None, :]
    b_tile = b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn
    total = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        in_k = k < K - k0
        a = tl.load(a_tile, mask=in_m[:, None] & in_k[None, :], other=0.0)
        b = tl.load(b_tile, mask=in_k[:, None] & in_n[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        a_tile += BLOCK_K
        b_tile += tl.cast(BLOCK_K, tl.int64) * stride_bk
    return total


@triton.jit
def load(ptr, stride_m, m, n, in_m, in_n):
    """The fp32 tile of a matrix with unit inner stride, 0 outside it."""
    return tl.load(ptr + m[:, None] * stride_m + n[None, :], mask=in_m[:, None] & in_n[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def store(ptr, stride_m, m, n, in_m, in_n, value):
    """Round a tile once, to the matrix's type, and write it."""
    out = ptr + m[:, None] * stride_m + n[None, :]
    tl.store(out, value.to(ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def add_bias(z, b_ptr, n, in_n):
    if b_ptr is not None:
        z += tl.load(b_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def scale(ptr, value):
    """A scale as fp32: learned ones are read from memory, where they are, so that nothing waits for the device."""
    if ptr is not None:
        return tl.load(ptr).to(tl.float32)
    else:
        return value


@triton.jit
def branch_scale(ptr, value, n, in_n, IS_PER_CHANNEL: tl.constexpr):
    """The branch's scale, shaped to multiply a tile: one number, or one per column."""
    if IS_PER_CHANNEL:
        return tl.load(ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    else:
        return scale(ptr, value)
