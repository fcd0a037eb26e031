"""How a kernel cuts its output into tiles. Plain values: dispatch chooses them, launchers obey, neither needs a GPU."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """BLOCK_M × BLOCK_N of the output per program, by pointers; BLOCK_K of a product's depth per step."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    warps: int
    stages: int


class PersistentTile(NamedTuple):
    """BLOCK_M × BLOCK_N of the output at a time, by descriptors; BLOCK_K of a product's depth per step.

    Programs go from tile to tile, `residents` of them on a multiprocessor; `group` tiles of rows go through all columns
    before others do. A tile is finished in `parts` of its columns, 1, 2 or 4.
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
    by_descriptors: bool = False


class Elementwise(NamedTuple):
    """Products by the vendor's library; what stands around them in one kernel, BLOCK_M × BLOCK_N per program."""

    BLOCK_M: int
    BLOCK_N: int
    warps: int


class Separate(NamedTuple):
    """A layer's backward with dz in a kernel of its own, and dx in another, or, None, by the library."""

    dz: Tile
    dx: Tile | None


class Inside(NamedTuple):
    """A layer's backward with dz made inside the product for dx."""

    dx: PersistentTile


class Together(NamedTuple):
    """A layer's backward in one kernel, for which forward keeps x alone."""

    rows: StackTile


class Plan(NamedTuple):
    """Which kernels run a layer, with their tiles: forward without gradients and forward that keeps, backward, and dw
    as far as backward leaves it over, None by the library."""

    forward: Tile | PersistentTile | Elementwise
    training: Tile | PersistentTile | Elementwise
    backward: Separate | Inside | Together
    weight: SplitTile | None
