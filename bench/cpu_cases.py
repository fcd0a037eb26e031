"""The networks that CPU times are measured on, with the ratios asked for and the floors.

    z = x Wᵀ + b        y = λ x + gelu(z) where sizes agree, else gelu(z)        x [M, d₀], sizes [d₀, …, d_L]

Every layer is followed by GELU, the last one too. λ is 1, or with `learns` a tensor of one number for each skip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

import torch

PASSES = ("F", "FB")  # forward without gradients; forward, mean squared error, backward to every parameter

# What two threads of the measured machine reach (a study's figures, not this machine's): products, and one thread's
# nanoseconds per element for gelu, and for the slope that backward adds.
FLOPS_PER_S = 550e9
GELU_NS = 0.16
SLOPE_NS = 0.28
FLOOR_THREADS = 2


@dataclass(frozen=True)
class Row:
    """One network at one batch. `bar` and `stated_floor_ms` are by pass, where one is asked for or stated."""

    name: str
    sizes: tuple[int, ...]
    M: int
    dtype: torch.dtype = torch.float32
    learns: bool = False
    bar: dict[str, float] = field(default_factory=dict)  # at least this many times as fast as the best torch.compile
    stated_floor_ms: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(K, N) of each layer."""
        return list(pairwise(self.sizes))

    @property
    def skips(self) -> list[bool]:
        return [K == N for K, N in self.layers]

    @property
    def depth(self) -> int:
        return len(self.sizes) - 1

    @property
    def can_stack(self) -> bool:
        """Whether some two layers in a row are square and of one width, so that they fit one [L, N, N]."""
        return any(K == N == L for (K, N), (_, L) in pairwise(self.layers))

    def runs(self) -> list[range]:
        """The layers in order, cut into runs: square ones of one width together, any other alone."""
        runs, first = [], 0
        for size, of_one_kind in groupby(self.layers, key=lambda layer: layer if layer[0] == layer[1] else None):
            count = len(list(of_one_kind))
            for length in [count] if size else [1] * count:
                runs.append(range(first, first + length))
                first += length
        return runs

    def shrunk(self, M: int) -> Row:
        """The same network on at most M rows."""
        return replace(self, M=min(self.M, M))

    def floor_ms(self, kind: str) -> float | None:
        """The stated floor, else the formula's; none for bfloat16, whose rates are others."""
        if self.dtype != torch.float32:
            return None
        return self.stated_floor_ms.get(kind, self.computed_floor_ms(kind))

    def computed_floor_ms(self, kind: str) -> float:
        """F   2 M Σ N K flops, and gelu on M Σ N elements
        FB  three products a layer, but no dx for the first one, and gelu and its slope on the elements

        at FLOPS_PER_S, and GELU_NS and SLOPE_NS shared by FLOOR_THREADS. Memory and calls cost nothing here.
        """
        products = [2 * self.M * N * K for K, N in self.layers]
        elements = self.M * sum(self.sizes[1:])
        flops = sum(products) if kind == "F" else 3 * sum(products) - products[0]
        ns = GELU_NS if kind == "F" else GELU_NS + SLOPE_NS
        return 1e3 * flops / FLOPS_PER_S + 1e-6 * elements * ns / FLOOR_THREADS


def _bars(forward: float, both: float) -> dict[str, float]:
    return {"F": forward, "FB": both}


_A = (3,) * 13 + (1,)
_B = (128, 256, 512, 1024, 512, 256, 128, 1)  # no two neighbours agree: no skip, no λ
_C = (64,) * 17 + (1,)
_D = (1024,) * 9
_E = (1024,) * 2

BASE = (
    Row("a1", _A, 1, bar=_bars(9, 3)),
    Row("a4096", _A, 4096, bar=_bars(13, 6)),
    Row("a65536", _A, 65536, bar=_bars(10, 9)),
    Row("b1", _B, 1, bar=_bars(3.3, 2.2)),
    Row("b512", _B, 512, bar=_bars(2.1, 1.9), stated_floor_ms={"F": 2.6, "FB": 7.6}),
    Row("c1", _C, 1, bar=_bars(14, 3.3)),
    Row("c1024", _C, 1024, bar=_bars(2.5, 2.4), stated_floor_ms={"F": 0.33}),
    Row("c65536", _C, 65536, bar=_bars(2.8, 2.4), stated_floor_ms={"F": 21, "FB": 76}),
    Row("d-fp32", _D, 4096, bar=_bars(2.2, 2.1), stated_floor_ms={"F": 125, "FB": 359}),
    Row("d-bf16", _D, 4096, torch.bfloat16, bar=_bars(1.03, 1.2)),
    Row("e", _E, 8192, bar=_bars(1.9, 1.7)),
    Row("f100", (32,) * 101, 256, bar=_bars(5.5, 3.4)),
    Row("f1000", (16,) * 1001, 64, bar=_bars(28, 4)),
)
DEEP = (  # whose memory is asked for, not their time
    Row("g64", (128,) * 65, 65536),
    *(Row(f"h{width}", (width,) * 1001, 4096) for width in (16, 64, 128)),
)
LEARNED = tuple(replace(row, name=f"{row}-learned", learns=True, bar={}) for row in BASE if any(row.skips))
ROWS = BASE + LEARNED


def named(name: str) -> Row:
    found = [row for row in (*ROWS, *DEEP) if row.name == name]
    if not found:
        raise ValueError(f"a row must be one of {', '.join(map(str, (*ROWS, *DEEP)))}, got {name}")
    return found[0]


# ---------------------------------------------------------------------------------------------- the sweep

SWEEP_ROWS = (1, 7, 64, 1000, 20000)
SWEEP_WIDTHS = (1, 3, 16, 33, 64, 100, 128, 257, 512, 1024)
SWEEP_DEPTHS = (1, 4, 32)


def sweep(
    rows: tuple[int, ...] = SWEEP_ROWS, widths: tuple[int, ...] = SWEEP_WIDTHS, depths: tuple[int, ...] = SWEEP_DEPTHS
) -> Iterator[Row]:
    """Networks of `depth` layers [width, width], each with its skip; the lightest first."""
    shapes = sorted((M * w * (w + 64) * depth, M, w, depth) for M in rows for w in widths for depth in depths)
    for _, M, width, depth in shapes:
        yield Row(f"{M}x{width}x{depth}", (width,) * (depth + 1), M)
