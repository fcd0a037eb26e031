"""A run of L residual layers of equal width, forward, in one kernel.

    z_l = h_l w_lᵀ + b_l        h_{l+1} = λ_l h_l + a_l drop(φ(z_l))        IS_POST: φ(λ_l h_l + a_l drop(z_l))
    h_0 = x [M, d]   y = h_L [M, d]   w [L, d, d]   b [L, d]
    λ one number or [L], no such term without HAS_SKIP;  a one number, [L] or [L, d];  drop: stochastic depth by rows
    kept [(L - 1) // every, M, d] = h_every, h_2·every, …, for backward, where it is given

A program owns BLOCK_M rows and takes them through all layers in registers, where each h_l is rounded to x's type, as if
every layer were a kernel of its own. WIDTH is d, BLOCK_D the power of two that it is padded to; padding is 0 in every
operand, so that NaN stays in its row.

Where a layer's weights are too many for registers, h_l goes to memory, into y's rows, which are the program's own and
stay in a cache: products then take both operands from there, BLOCK_K of their depth at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import StackTile
from ..spec import Run
from .activations import activate, formula
from .launching import cdiv, launch
from .layer import rows, vector
from .philox import drop_rows, keeps_row
from .tile import add_bias, store
from .tile import product as product_from_memory

# told nothing, ptxas spills 4 to 28 bytes for the sake of occupancy, with 72 to 128 of 255 registers in use
ALL_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}


@triton.jit(do_not_specialize=["M", "L", "every", "lam", "a", "threshold", "keep_scale"])
def _forward_kernel(
    y_ptr, kept_ptr, x_ptr, stride_xm, w_ptr, b_ptr,
    lam_ptr, lam, a_ptr, a, seed_ptr, threshold_ptr, threshold, keep_scale_ptr, keep_scale,
    M, L, every, d,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, HAS_SKIP: tl.constexpr, IS_PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # place: this program owns rows m
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_D).to(tl.int64)
    in_m, in_n = m < M, n < WIDTH
    size = tl.cast(M, tl.int64) * WIDTH

    # climb: the rows stay, each layer's weights come to them
    h = operand(x_ptr, stride_xm, m, n, in_m, in_n)
    for layer in range(L):
        if kept_ptr is not None:
            if (layer > 0) & (layer % every == 0):
                store(kept_ptr + (layer // every - 1) * size, WIDTH, m, n, in_m, in_n, h)
        if BLOCK_K > 0:
            tl.debug_barrier()  # all have read h_{l-1}
            store(y_ptr, WIDTH, m, n, in_m, in_n, h)
            tl.debug_barrier()  # all of h_l is there
        h = climb(
            h, y_ptr, d, layer, m, n, in_m, in_n, w_ptr, b_ptr,
            lam_ptr, lam, a_ptr, a, seed_ptr, threshold_ptr, threshold, keep_scale_ptr, keep_scale,
            ACTIVATION, IS_POST, HAS_SKIP, IS_PER_CHANNEL, PRECISION, WIDTH, BLOCK_K,
        )  # fmt: skip
    if BLOCK_K > 0:
        tl.debug_barrier()
    store(y_ptr, WIDTH, m, n, in_m, in_n, h)


@triton.jit
def climb(
    h, h_ptr, d, layer, m, n, in_m, in_n, w_ptr, b_ptr,
    lam_ptr, lam, a_ptr, a, seed_ptr, threshold_ptr, threshold, keep_scale_ptr, keep_scale,
    ACTIVATION: tl.constexpr, IS_POST: tl.constexpr, HAS_SKIP: tl.constexpr, IS_PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h_{layer+1} of the rows m from their h_l, which lies at h_ptr too where products are from memory."""
    w = None if BLOCK_K > 0 else weight(w_ptr, layer, n, in_n, WIDTH)
    a = branch_scale(a_ptr, a, layer, n, in_n, IS_PER_CHANNEL, WIDTH)

    turns = 1
    if seed_ptr is not None:
        seed, threshold = tl.load(seed_ptr + layer), of_layer(threshold_ptr, threshold, layer)
        turns = keeps_any(m, in_m, seed, threshold)

    # branch: in no turn where the tile drops all its rows, else in one
    y = tl.zeros(h.shape, tl.float32)
    for _ in range(turns):
        z = product(h, w, h_ptr, WIDTH, d, w_ptr, b_ptr, layer, m, n, in_m, in_n, PRECISION, WIDTH, BLOCK_K)
        y = a * (z if IS_POST else activate(z, ACTIVATION))
    if seed_ptr is not None:
        y = drop_rows(y, m, seed, threshold, of_layer(keep_scale_ptr, keep_scale, layer))

    # finish: skip and activation
    if HAS_SKIP:
        y += of_layer(lam_ptr, lam, layer) * h.to(tl.float32)
    if IS_POST:
        y = activate(y, ACTIVATION)
    return unpadded(y, in_n, WIDTH).to(h.dtype)


@triton.jit
def operand(ptr, stride_m, m, n, in_m, in_n):
    """A tile of rows in the type it has in memory, 0 outside it."""
    return tl.load(ptr + m[:, None] * stride_m + n[None, :], mask=in_m[:, None] & in_n[None, :], other=0.0)


@triton.jit
def at_layer(w_ptr, layer, WIDTH: tl.constexpr):
    """Where w_l begins."""
    return w_ptr + layer * tl.cast(WIDTH * WIDTH, tl.int64)


@triton.jit
def weight(w_ptr, layer, n, in_n, WIDTH: tl.constexpr):
    """w_l [BLOCK_D, BLOCK_D], output features first."""
    return operand(at_layer(w_ptr, layer, WIDTH), WIDTH, n, n, in_n, in_n)


@triton.jit
def product(
    h, w, h_ptr, stride_hm, d, w_ptr, b_ptr, layer, m, n, in_m, in_n,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z_l in fp32, 0 in its padding: of h and w, or of h_l and w_l from memory.

    d is WIDTH, known at run time alone: a loop of a known length is unrolled in full, and spills.
    """
    if BLOCK_K > 0:
        w_l = at_layer(w_ptr, layer, WIDTH)
        z = product_from_memory(h_ptr, stride_hm, w_l, WIDTH, 1, m, n, in_m, in_n, d, BLOCK_K, PRECISION)
    else:
        z = tl.dot(h, tl.trans(w), input_precision=PRECISION)
    return unpadded(add_bias(z, b_ptr, layer * WIDTH + n, in_n), in_n, WIDTH)


@triton.jit
def unpadded(tile, in_n, WIDTH: tl.constexpr):
    """0 in the columns that pad it, where a row's NaN or infinity times the weights' padding has left NaN."""
    if tile.shape[1] == WIDTH:
        return tile
    else:
        return tl.where(in_n[None, :], tile, 0.0)


@triton.jit
def of_layer(ptr, value, layer):
    """A layer's own number from memory, or the one that all layers share."""
    if ptr is not None:
        return tl.load(ptr + layer)
    else:
        return value


@triton.jit
def branch_scale(a_ptr, a, layer, n, in_n, IS_PER_CHANNEL: tl.constexpr, WIDTH: tl.constexpr):
    """The branch's scale, shaped to multiply a tile: a layer's number, or one per column."""
    if IS_PER_CHANNEL:
        return tl.load(a_ptr + layer * WIDTH + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    else:
        return of_layer(a_ptr, a, layer)


@triton.jit
def keeps_any(m, in_m, seed, threshold):
    """1 where any row of a tile keeps its branch, else 0: the turns of a loop around its products.

    An `if` would do too, but for exact fp32 the compiler then spills what they read, 588 bytes of 16 x 64 on sm_90.
    """
    return tl.max((keeps_row(m, seed, threshold) & in_m).to(tl.int32), axis=0)


def forward(
    x: Tensor, run: Run, tile: StackTile, precision: str, keep_every: int | None
) -> tuple[Tensor, Tensor | None]:
    """y [M, d], and kept [(L - 1) // keep_every, M, d] where something is to be kept."""
    (M, d), L = x.shape, run.weight.shape[0]
    y = x.new_empty(M, d)
    kept = None if keep_every is None else x.new_empty((L - 1) // keep_every, M, d)
    forward_into(y, kept, x, run, tile, precision, keep_every or 1)
    return y, kept


def forward_into(
    y: Tensor, kept: Tensor | None, x: Tensor, run: Run, tile: StackTile, precision: str, every: int
) -> None:
    """The same into memory that is there, dense matrices."""
    (M, d), L = x.shape, run.weight.shape[0]
    x = rows(x)
    compiled_for = {
        **options(run), "PRECISION": precision, "WIDTH": d,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_D": padded(d), "BLOCK_K": tile.BLOCK_K,
        "num_warps": tile.warps, "num_stages": tile.stages, **ALL_REGISTERS,
    }  # fmt: skip
    given = (y, kept, x, x.stride(0), *parameters(run), M, L, every, d)
    launch(_forward_kernel, cdiv(M, tile.BLOCK_M), given, compiled_for)


def parameters(run: Run) -> tuple[Tensor | float | None, ...]:
    """What both kernels are given of a run: dense tensors, and numbers in the place of those that it has not."""

    def split(value: Tensor | float) -> tuple[Tensor | None, float]:
        return (value.contiguous(), 0) if isinstance(value, Tensor) else (None, value)

    return (
        run.weight.contiguous(),
        vector(run.bias),
        *split(run.skip_scale),
        *split(run.branch_scale),
        run.seeds,
        *split(run.threshold),
        *split(run.keep_scale),
    )


def options(run: Run) -> dict[str, str | bool]:
    return {
        "ACTIVATION": formula(run.activation, run.weight.dtype),
        "IS_POST": run.order == "post",
        "HAS_SKIP": run.has_skip,
        "IS_PER_CHANNEL": isinstance(run.branch_scale, Tensor) and run.branch_scale.dim() == 2,
    }


def padded(d: int) -> int:
    """The power of two that a width is padded to: products have no fewer than 16 columns."""
    return max(16, 1 << (d - 1).bit_length())
