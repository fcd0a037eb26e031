"""What `bench/tune.py` tries for each part of a layer's plan: few forms, the heuristic's own first, then by promise.

A part is named as in `Plan`, where backward is without dw. A narrow layer's plan may be in one kernel or in pieces:
"together" are the forms of the one, "training" and "backward" those of the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from fusedres import plans
from fusedres.kernels.config import (
    Elementwise,
    Inside,
    PersistentTile,
    Separate,
    SplitTile,
    StackTile,
    Tile,
    Together,
)

MOST = 8  # candidates of a part


class InPieces(plans.Facts):
    """The same layer, however narrow, where forward keeps what backward in pieces reads."""

    is_together = False  # type: ignore[assignment]


def candidates(facts: plans.Facts, rows: int, multiprocessors: int, most: int = MOST) -> dict[str, list[Any]]:
    """Forms by part; those of a layer in pieces, and "together" beside them where it may be one kernel."""
    pieces = InPieces(*facts)
    own = plans.heuristic(pieces)[0]
    found = {
        "forward": _few([plans.heuristic(facts)[0].forward, *_forwards(pieces)], pieces, most),
        "training": _few([own.training, *_forwards(pieces)], pieces, most),
        "backward": _few([own.backward, *_backwards(pieces)], pieces, most),
        "weight": _few([None, *_weights(pieces, rows, multiprocessors)], pieces, most),
    }
    if facts.is_together:
        found["together"] = _few(_togethers(plans.heuristic(facts)[0].backward.rows), facts, most)
    return found


def label(form: Any) -> str:
    """Inside(PersistentTile(128, 256, 32, 8, 4, 2, 8, 1)); what the library does is None, as in a plan."""
    if not isinstance(form, tuple):
        return str(form)
    return f"{type(form).__name__}({', '.join(map(label, form))})"


def _few(forms: Iterable[Any], facts: plans.Facts, most: int) -> list[Any]:
    """The first of those that dispatch admits for the layer, each once."""
    return list(islice(dict.fromkeys(form for form in forms if not plans.why_not(facts, form)), most))


def _forwards(facts: plans.Facts) -> list[Tile | PersistentTile | Elementwise]:
    if facts.is_skinny:
        return [*_pointers(facts, facts.N, facts.K, "forward"), Elementwise(16, 64, 4)]
    widest = max(facts.N, facts.K)
    descriptors = TILED[_kind(facts)]
    if widest <= plans.WHOLE_UP_TO and facts.dtype.itemsize == 2:
        fitting = (tile for tile in descriptors if widest >= tile.BLOCK_N)
        descriptors = [*_around_whole(plans.whole_tile(facts)), *fitting]
    own, *pointers = _pointers(facts, facts.N, facts.K, "forward")
    library = [plans.ELEMENTWISE, Elementwise(16, 256, 4)]
    return [library[0], *descriptors[:4], pointers[0], library[1], *descriptors[4:], *pointers[1:], own]


def _backwards(facts: plans.Facts) -> list[Separate | Inside]:
    """The library's dx is never far from the first; dz by itself is a pass, which tiles of any shape make."""
    dz = plans._tile(facts, facts.N, facts.K, "dz")
    products = _pointers(facts, facts.K, facts.N, "dx")
    if facts.is_skinny:
        return [Separate(dz, None), *(Separate(dz, dx) for dx in products)]
    insides = [Inside(tile) for tile in INSIDE] if facts.dtype.itemsize == 2 else []
    narrower = dz._replace(BLOCK_M=32, warps=4)
    return [Separate(dz, None), *insides[:3], Separate(narrower, None), Separate(dz, products[0]), *insides[3:]]


def _togethers(own: StackTile) -> list[Together]:
    """Around the heuristic's, most of them lighter: its own is the largest that does not spill."""
    lower = own._replace(BLOCK_M=max(16, own.BLOCK_M // 2))
    stages = 2 if own.stages == 3 else 3
    wide = own._replace(warps=8)
    taller = wide._replace(BLOCK_M=2 * own.BLOCK_M)
    rows = [
        own,
        own._replace(stages=stages),
        lower,
        wide,
        lower._replace(stages=stages),
        lower._replace(warps=8),
        taller,
    ]
    return [Together(tile) for tile in rows]


def _weights(facts: plans.Facts, rows: int, multiprocessors: int) -> list[SplitTile]:
    """Shares of the rows so that all tiles of dw together fill the GPU once, or twice by pointers."""
    found = []
    for block_n, block_k, block_m, warps, stages, by_descriptors in SPLIT[_kind(facts)]:
        block_n, block_k = _clipped(facts.N, block_n), _clipped(facts.K, block_k)
        tiles = -(-facts.N // block_n) * -(-facts.K // block_k)
        most = max(1, rows // (2 * block_m))  # two steps to a share at least
        splits = max(1, min(most, (1 if by_descriptors else 2) * multiprocessors // tiles))
        found.append(SplitTile(block_n, block_k, block_m, warps, stages, splits, by_descriptors))
    return found


def _pointers(facts: plans.Facts, columns: int, depth: int, work: str) -> list[Tile]:
    """Tiles by pointers for an output of so many columns and products of this depth; the heuristic's first."""
    own = plans._tile(facts, columns, depth, work)
    shapes = (SKINNY if facts.is_skinny else POINTERS)[_kind(facts)]
    tiles = [Tile(m, _clipped(columns, n), _clipped(depth, k), warps, stages) for m, n, k, warps, stages in shapes]
    return [own, *tiles]


def _kind(facts: plans.Facts) -> str:
    return "half" if facts.dtype.itemsize == 2 else "exact" if facts.is_exact_fp32 else "tf32"


def _clipped(size: int, largest: int) -> int:
    return plans._power_of_two(size, min(32, largest), largest)


def _around_whole(own: PersistentTile) -> list[PersistentTile]:
    """w in shared memory leaves a tile's height, what is in flight, and how many programs share a multiprocessor."""
    taller = [own._replace(BLOCK_M=128, residents=max(1, own.residents // 2))] if own.BLOCK_N == 64 else []
    return [own, own._replace(stages=own.stages - 1), own._replace(parts=min(4, 2 * own.parts)), *taller]


TILED = {
    "half": [
        plans.TILED,
        plans.TILED_DEEP,
        PersistentTile(128, 256, 64, 8, 4, parts=4),
        PersistentTile(128, 128, 64, 8, 4, parts=2),
        PersistentTile(256, 128, 64, 8, 3, parts=4),
        PersistentTile(128, 128, 64, 4, 2, parts=4, residents=2),
    ],
    "tf32": [PersistentTile(128, 128, 32, 8, 3, parts=4), PersistentTile(128, 128, 32, 4, 3, parts=4, residents=2)],
    "exact": [],
}
INSIDE = [
    plans.INSIDE.dx,
    plans.BLACKWELL_INSIDE.dx,
    plans.INSIDE_BUSY.dx,
    PersistentTile(128, 128, 64, 8, 3, parts=2),
    PersistentTile(64, 128, 64, 4, 3, parts=2, residents=2),
]
POINTERS = {  # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
    "half": [(128, 64, 64, 8, 3), (64, 128, 64, 8, 3), (128, 128, 32, 8, 3)],
    "tf32": [(64, 128, 32, 8, 3), (64, 64, 32, 4, 4), (128, 64, 32, 8, 2)],
    "exact": [(128, 64, 16, 8, 3), (64, 64, 32, 8, 2)],
}
SKINNY = {
    "half": [(16, 32, 128, 4, 4), (16, 64, 128, 4, 4), (32, 32, 128, 4, 4), (64, 64, 64, 4, 4), (16, 16, 256, 4, 3)],
    "tf32": [(16, 32, 64, 4, 4), (16, 64, 64, 4, 4), (32, 32, 64, 4, 4), (64, 64, 32, 4, 4)],
    "exact": [(16, 32, 32, 4, 3), (32, 32, 32, 4, 3), (64, 32, 16, 4, 3)],
}
SPLIT = {  # BLOCK_N, BLOCK_K, BLOCK_M, warps, stages, by descriptors
    "half": [
        (128, 256, 64, 8, 3, True),
        (128, 128, 64, 8, 4, True),
        (128, 128, 64, 8, 3, False),
        (128, 128, 32, 4, 4, False),
        (64, 64, 64, 4, 4, False),
        (64, 64, 128, 4, 3, True),
    ],
    "tf32": [(128, 128, 32, 8, 3, False), (64, 64, 64, 4, 3, False)],
    "exact": [(64, 64, 16, 8, 3, False), (32, 64, 32, 4, 3, False)],
}
