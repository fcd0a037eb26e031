"""What a run of L layers of width d moves, counted from its kernels' loads and stores, beside the least there could be.

    python bench/stack_bytes.py --rows 65536 --layers 32

Weights, biases and scales are left out: each tile of rows reads all of them, but out of a cache. So are the rows that
wide layers multiply, which the same program has just written or read; `Traffic.cached` has them.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from configurations import STACK_WIDTHS

from fusedres import dispatch
from fusedres.kernels.config import StackTile


class Traffic(NamedTuple):
    """Bytes read and written: of rows [M, d] between layers, of partial sums of dw, and by the library's products.

    cached: of rows that a program multiplies from memory, while its tile of them is in a cache.
    """

    rows: int
    sums: int = 0
    products: int = 0
    cached: int = 0


def forward(M: int, d: int, L: int, itemsize: int, keep_every: int | None, from_memory: bool = False) -> Traffic:
    """x read, y written, and every kept h written once; from memory, every h written into y and read."""
    kept = 0 if keep_every is None else (L - 1) // keep_every
    matrix = M * d * itemsize
    return Traffic((2 + kept) * matrix, cached=2 * L * matrix if from_memory else 0)


def backward(M: int, d: int, L: int, itemsize: int, keep_every: int, sums_weight: bool, tile: StackTile) -> Traffic:
    """g read and dx written; every h made and read; dw's sums, or dz and the products that read it."""
    matrix = M * d * itemsize
    from_memory = tile.BLOCK_K > 0
    cached = 2 * L * matrix if from_memory else 0  # h and dz
    if sums_weight:
        tiles = -(-M // tile.BLOCK_M)
        # each tile writes its sums, and reads those before it; for a program's first tile, torch reads them at the end
        sums = 2 * tiles * L * d * d * 4
        scratch = 0 if keep_every == 1 else 2 * L + -(-L // keep_every)
        return Traffic((2 + (scratch or L)) * matrix, sums)
    if keep_every == 1:
        return Traffic((2 + 2 * L) * matrix, 0, 2 * L * matrix, cached)
    # segments: a forward kernel reads one h and writes the others; g passes between them in fp32
    segments = -(-L // keep_every)
    climbed = sum(n for first in range(0, L, keep_every) if (n := min(keep_every, L - first)) > 1)
    handed_on = 2 * (segments - 1) * M * d * 4
    if from_memory:
        cached += 2 * (L - segments) * matrix
    return Traffic((2 + climbed + 2 * L) * matrix + handed_on, 0, 2 * L * matrix, cached)


def least(M: int, d: int, L: int, itemsize: int, trains: bool) -> int:
    """x read, y written; training reads g and x and writes dx too, and writes and reads every h in between."""
    passes = 2 + 2 + 2 * (L - 1) + 1 if trains else 2
    return passes * M * d * itemsize


def table(M: int, L: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """Passes over an [M, d] matrix per layer, with the tiles of a Hopper; both forms of dw where it has both."""
    lines = [f"passes over [{M}, d] per layer, L = {L}, {str(dtype).removeprefix('torch.')}"]
    titles = f"{'forward':>8}{'rows':>8}{'sums':>8}{'products':>9}{'training':>9}{'cached':>8}"
    lines.append(f"{'d':>4} {'h kept':<10}{'dw':<11}{titles}")
    for d in STACK_WIDTHS:
        tiles = dispatch.stack_tiles(d, dtype, dispatch.precision(dtype), "hopper", False)
        per_layer = L * M * d * dtype.itemsize
        for keep_every in (1, dispatch.stack_keeps(L, M, d, dtype, recompute=True)):
            for sums_weight in (True, False) if dispatch.stack_sums_weight(1, d, 1) else (False,):
                up = forward(M, d, L, dtype.itemsize, keep_every, tiles.forward.BLOCK_K > 0)
                down = backward(M, d, L, dtype.itemsize, keep_every, sums_weight, tiles.backward)
                *memory, cached = down
                passes = [n / per_layer for n in (up.rows, *memory, up.rows + sum(memory), up.cached + cached)]
                numbers = "".join(f"{n:>{width}.2f}" for n, width in zip(passes, (8, 8, 8, 9, 9, 8), strict=True))
                form = "summed" if sums_weight else "dz written"
                lines.append(f"{d:>4} {f'every {keep_every}':<10}{form:<11}{numbers}")
    bounds = [least(M, 1, L, 1, trains) / (L * M) for trains in (False, True)]
    lines.append(f"at least: forward without keeping {bounds[0]:.2f}, training {bounds[1]:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    print(table(options.rows, options.layers))


if __name__ == "__main__":
    main()
