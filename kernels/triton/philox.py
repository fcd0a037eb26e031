"""Stochastic depth: which rows keep their branch, from Philox4x32-10 with the row's index as its counter."""

import triton
import triton.language as tl


@triton.jit
def keeps_row(m, seed, threshold):
    """True for the rows m [BLOCK_M] int64 whose word is at least threshold; `fusedres/philox.py` says the same."""
    low = (m & 0xFFFFFFFF).to(tl.uint32)
    high = (m >> 32).to(tl.uint32)
    zero = low * 0
    word, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return word.to(tl.int64) >= threshold


@triton.jit
def drop_rows(branch, m, seed, threshold, keep_scale):
    """branch [BLOCK_M, BLOCK_N] · keep_scale in kept rows and 0 in dropped ones, whatever stood there."""
    return tl.where(keeps_row(m, seed, threshold)[:, None], branch * keep_scale, 0.0)
