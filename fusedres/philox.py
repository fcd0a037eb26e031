"""Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).

Stochastic depth asks it one word per row: the key is the layer call's 64-bit seed, the counter is the row's index.
`kernels/triton/philox.py` computes the same words, so every backend drops the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def draw_seed() -> Tensor:
    """A 63-bit seed, int64 [], from torch's CPU generator whatever the device: the same rows drop on every backend."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")


def draw_seeds(layers: Sequence[int], depth: int) -> Tensor:
    """int64 [depth]: at each of these layers what `draw_seed` would draw, called once for each in order; else 0."""
    drawn = torch.randint(0, 2**63 - 1, (len(layers),), dtype=torch.int64, device="cpu")
    if len(layers) == depth:
        return drawn
    return torch.zeros(depth, dtype=torch.int64, device="cpu").index_copy(0, torch.tensor(layers, device="cpu"), drawn)


def words(seed: Tensor, counter: Tensor) -> Tensor:
    """The first Philox word of every counter: seed [] int64, counter [...] int64 -> [...] int64 in [0, 2³²)."""
    # int64 products wrap, but keep the low 64 bits of the 32 × 32 bit product, which is all of it
    c0, c1 = counter & _WORD, (counter >> 32) & _WORD
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & _WORD) ^ c1 ^ k0,
            high & _WORD,
            ((low >> 32) & _WORD) ^ c3 ^ k1,
            low & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0


def kept_rows(seed: Tensor, leading: torch.Size, threshold: int, device: torch.device) -> Tensor:
    """True where a row's word is at least threshold: bool [*leading]; rows count in row-major order."""
    rows = torch.arange(prod(leading), device=device).reshape(leading)  # Size.numel() would fix a symbolic size
    return words(seed.to(device), rows) >= threshold
