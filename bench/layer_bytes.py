"""What the kernels of a layer move, counted from their loads and stores, beside the least there could be.

    python bench/layer_bytes.py --rows 65536

z = x wᵀ + b, y = λ x + φ(z), N = K; λ and a are numbers, φ' is kept, all gradients are wanted. Tests count these bytes
where the interpreter loads and stores. A product of the library reads its operands and writes its result once.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

from fusedres import plans
from fusedres.kernels.config import Elementwise, Inside, PersistentTile, Plan, Separate, SplitTile, Tile, Together

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
PROGRAMS = 132  # multiprocessors of an H100
SUM = 4  # bytes of a number in a partial sum


class Size(NamedTuple):
    """A layer x [M, K] -> y [M, N] in numbers of so many bytes."""

    M: int
    N: int
    K: int
    itemsize: int

    @property
    def x(self) -> int:
        return self.M * self.K * self.itemsize

    @property
    def z(self) -> int:
        """Of z, y, g, dz or what is kept."""
        return self.M * self.N * self.itemsize

    @property
    def w(self) -> int:
        return self.N * self.K * self.itemsize

    @property
    def b(self) -> int:
        return self.N * self.itemsize


class Kernel(NamedTuple):
    """One launch: bytes by tensor, each read or written once; `again`: read once more, out of a cache.

    `issues` names the kernel whose instructions are counted; None: not ours, or too small to matter.
    """

    name: str
    reads: dict[str, int]
    writes: dict[str, int]
    again: dict[str, int] = {}  # noqa: RUF012 : never changed
    flops: int = 0
    issues: str | None = None

    @property
    def moved(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def cached(self) -> int:
        return sum(self.again.values())


def layer_facts(d: int) -> plans.Facts:
    """Of a layer [d] -> [d] in bf16 on a Hopper that nothing was measured on."""
    place = ("identity", "cuda", 90, "", False, False, True, True, "plain")
    return plans.Facts(d, d, torch.bfloat16, "ieee", *place)


def forward(form: Tile | PersistentTile | Elementwise, size: Size, keeps: bool, programs: int) -> list[Kernel]:
    """y, and φ' where keeps; `programs` multiprocessors, each with the form's residents."""
    M, N, K, _ = size
    flops = 2 * M * N * K
    writes = {"kept": size.z, "y": size.z} if keeps else {"y": size.z}
    given = {"x": size.x, "w": size.w, "b": size.b}
    if isinstance(form, Elementwise):
        return [
            Kernel("product", given, {"z": size.z}, flops=flops),
            Kernel("finish", {"z": size.z, "x": size.x}, writes, issues="finish"),
        ]
    down, across = _tiles(M, form.BLOCK_M), _tiles(N, form.BLOCK_N)
    if isinstance(form, PersistentTile) and form.BLOCK_N >= N and form.BLOCK_K >= K:
        working = min(down, form.residents * programs)  # each reads w once, and holds it
        again = {"w": (working - 1) * size.w, "b": (working - 1) * size.b}
        skip = {} if form.BLOCK_N == form.BLOCK_K else {"x": size.x}
        return [Kernel("forward", given, writes, again | skip, flops, "persistent")]
    again = {"x": across * size.x, "w": (down - 1) * size.w, "b": (down - 1) * size.b}  # the skip is x once more
    name = "forward" if isinstance(form, Tile) else "persistent"
    return [Kernel("forward", given, writes, again, flops, name)]


def backward(plan: Plan, size: Size, programs: int) -> list[Kernel]:
    """dx, dw and db; the kernel that adds partial sums is one of them, and so is torch's rounding of dw."""
    M, N, K, _ = size
    product = 2 * M * N * K
    if isinstance(plan.backward, Together):
        working = min(2 * programs, _tiles(M, plan.backward.rows.BLOCK_M))
        parts = {"parts of dw": working * N * K * SUM, "parts of db": working * N * SUM}
        again = {"w": (working - 1) * size.w, "b": (working - 1) * size.b}
        reads = {"g": size.z, "x": size.x, "w": size.w, "b": size.b}
        down = Kernel("backward", reads, {"dx": size.x, **parts}, again, 3 * product, "narrow")
        return [down, Kernel("sums", parts, {"dw": size.w, "db": size.b})]
    if isinstance(plan.backward, Inside):
        tile = plan.backward.dx
        down, across = _tiles(M, tile.BLOCK_M), _tiles(K, tile.BLOCK_N)
        db = down * N * SUM
        reads = {"g": size.z, "kept": size.z, "w": size.w}
        again = {"g": across * size.z, "kept": (across - 1) * size.z, "w": (down - 1) * size.w}  # the skip's is g
        writes = {"dz": size.z, "parts of db": db, "dx": size.x}
        kernels = [Kernel("dz and dx", reads, writes, again, product, "inside")]
    else:
        dz, dx = plan.backward
        db = _tiles(M, dz.BLOCK_M) * N * SUM
        kernels = [
            Kernel("dz", {"g": size.z, "kept": size.z}, {"dz": size.z, "parts of db": db}, issues="dz"),
            _dx(dx, size),
        ]
    return [*kernels, Kernel("sums", {"parts of db": db}, {"db": size.b}), *weight(plan.weight, size)]


def _dx(tile: Tile | None, size: Size) -> Kernel:
    reads = {"dz": size.z, "g": size.z, "w": size.w}
    flops = 2 * size.M * size.N * size.K
    if tile is None:
        return Kernel("dx", reads, {"dx": size.x}, flops=flops)
    down, across = _tiles(size.M, tile.BLOCK_M), _tiles(size.K, tile.BLOCK_N)
    again = {"dz": (across - 1) * size.z, "w": (down - 1) * size.w}
    return Kernel("dx", reads, {"dx": size.x}, again, flops, "dx")


def weight(tile: SplitTile | None, size: Size) -> list[Kernel]:
    """dzᵀ x: by the library in fp32, then rounded; or by shares of the rows, then added."""
    M, N, K, _ = size
    flops, reads = 2 * M * N * K, {"dz": size.z, "x": size.x}
    if tile is None:
        wide = {"dw in fp32": N * K * SUM}
        return [Kernel("dw", reads, wide, flops=flops), Kernel("round dw", wide, {"dw": size.w})]
    again = {"dz": (_tiles(K, tile.BLOCK_K) - 1) * size.z, "x": (_tiles(N, tile.BLOCK_N) - 1) * size.x}
    if tile.splits == 1:
        return [Kernel("dw", reads, {"dw": size.w}, again, flops, "weight")]
    parts = {"parts of dw": tile.splits * N * K * SUM}
    return [Kernel("dw", reads, parts, again, flops, "weight"), Kernel("sums", parts, {"dw": size.w})]


def training(plan: Plan, size: Size, programs: int) -> list[Kernel]:
    keeps = isinstance(plan.backward, (Separate, Inside))
    return forward(plan.training, size, keeps, programs) + backward(plan, size, programs)


def least(size: Size, trains: bool) -> int:
    """x and w read, y written; training reads g, x and w and writes dx and dw too: φ' can be computed again."""
    once = size.x + size.z + size.w + size.b
    return once + (2 * size.x + size.z + 2 * (size.w + size.b) if trains else 0)


def _tiles(length: int, block: int) -> int:
    return -(-length // block)


def table(M: int) -> str:
    """Passes over [M, d], from memory and out of a cache, by kernel, with the tiles that a Hopper is given."""
    lines = [f"passes over [{M}, d], bf16; + out of a cache, read again by other programs"]
    for d in WIDTHS:
        size, plan = Size(M, d, d, 2), plans.plan_of(layer_facts(d))
        ways = {"forward": forward(plan.forward, size, False, PROGRAMS), "training": training(plan, size, PROGRAMS)}
        for way, kernels in ways.items():
            total = sum(kernel.moved for kernel in kernels) / size.x
            said = ", ".join(
                f"{k.name} {k.moved / size.x:.2f}" + (f" + {k.cached / size.x:.2f}" if k.cached else "")
                for k in kernels
                if k.moved > size.x / 100
            )
            lines.append(
                f"{d:>5} {way:<9}{total:>6.2f}, at least {least(size, way == 'training') / size.x:.2f}: {said}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65536)
    print(table(parser.parse_args().rows))


if __name__ == "__main__":
    main()
