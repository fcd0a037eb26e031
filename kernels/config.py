"""How a kernel cuts its output into tiles. Plain values: dispatch chooses them, launchers obey, neither needs a GPU."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """BLOCK_M × BLOCK_N of the output per program; BLOCK_K of a product's depth per step."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of one layer's three kernels."""

    forward: Tile
    dz: Tile
    dx: Tile


class PersistentTile(NamedTuple):
    """BLOCK_M × BLOCK_N of the output at a time, by programs that go from tile to tile; BLOCK_K of the depth per step.

    A tile is finished in `parts` of its columns, 1, 2 or 4. `group` tiles of rows go through all columns before others
    do. A multiprocessor has `residents` programs.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    warps: int
    stages: int
    parts: int = 1
    group: int = 8
    residents: int = 1


class StackTile(NamedTuple):
    """BLOCK_M rows per program, whole rows: their columns are padded to a power of two.

    BLOCK_K of a product's depth per step, both operands from memory; 0: all of it at once, rows from registers.
    """

    BLOCK_M: int
    warps: int
    stages: int
    BLOCK_K: int = 0


class StackTiles(NamedTuple):
    """The tiles of a run's two kernels."""

    forward: StackTile
    backward: StackTile


class SumTile(NamedTuple):
    """BLOCK_M × BLOCK_N of a sum's numbers per program."""

    BLOCK_M: int
    BLOCK_N: int
    warps: int


class SplitTile(NamedTuple):
    """BLOCK_N × BLOCK_K of a product over rows per program, BLOCK_M rows per step; the steps in `splits` shares."""

    BLOCK_N: int
    BLOCK_K: int
    BLOCK_M: int
    warps: int
    stages: int
    splits: int
