"""How long kernels take on an H100, and by which assumptions: predicted, not measured. bench/predict.py has the tables.

A kernel takes the longest of what its bytes, its products and its instructions take; where a multiprocessor has one
program, finishing follows its products. A launch comes on top.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from layer_bytes import PROGRAMS, Kernel, Size

from fusedres.kernels.config import Inside, PersistentTile, Plan, StackTile, Tile, Together

M = 65536

ASSUMED: dict[str, tuple[float, str]] = {
    "memory_bytes_per_s": (3.0e12, "what a copy reaches of the 3.35e12 of the data sheet; read and written alike"),
    "flops_per_s": (620e12, "large bf16 products, ours as the library's, whose tiles are read again out of a cache"),
    "multiprocessors": (PROGRAMS, "an H100 SXM's"),
    "instructions_per_clock": (
        128,
        "of a multiprocessor's threads; gelu's two special functions, 16 a clock, take less than the rest",
    ),
    "clock_hz": (1.755e9, "under load; up to 1.98e9 without"),
    "launch_us": (
        2.0,
        "from a kernel's end to the full speed of one that waits for it; the host is ahead of the device",
    ),
    "cache_bytes": (32e6, "of the 50 MB cache, that hold what was last read or written until a later kernel reads it"),
    "cache_bytes_per_s": (5.5e12, "at which that is read"),
}
OPPONENTS = {
    "compile": "forward: a product, and a pointwise kernel that reads z and x and writes y (5 passes), z kept. "
    "Backward: dz with partial sums of db (3), dx with the skip in the product (3), dw rounded in the product (2). "
    "Where autotuning takes the epilogue into a product, forward has 2 passes, as ours has, and ours no gain",
    "eager": "forward: product, gelu, sum (7 passes). Backward: dz (3), db (1), dx (2), dw (2), the sum at x (3)",
    "matmul": "x wᵀ alone",
    "everybody": "waves of programs that are not full, latencies and the host's time are left out; so are pointwise "
    "kernels' instructions, but for ours; and so is the cache that tiles are read again out of: at 620 TFLOP/s tiles "
    "of 128 x 128 ask 9.7e12 bytes a second of it, of 128 x 256 7.3e12; of an H100's, 5.5e12 to 12e12 are published",
}


class Count(NamedTuple):
    """What bench/issued.py counts."""

    per_tile: int
    per_step: list[int]
    threads: int
    residents: int


class Time(NamedTuple):
    """Microseconds of a kernel, its launch included; overlapped: where finishing hides behind products everywhere."""

    name: str
    us: float
    overlapped: float


def value(name: str) -> float:
    return ASSUMED[name][0]


# ---------------------------------------------------------------------------------------------- our instructions


def configuration(kernel: Kernel, plan: Plan, keeps: bool, d: int) -> tuple[str, bool, Any]:
    """How bench/issued.py names what it counts: kernel, whether it keeps, tile."""
    forms: dict[str, PersistentTile | StackTile | Tile] = {}
    if isinstance(form := plan.training if keeps else plan.forward, PersistentTile):
        forms["persistent"] = form
    if isinstance(plan.backward, Inside):
        forms["inside"] = plan.backward.dx
    elif isinstance(plan.backward, Together):
        forms["narrow"] = plan.backward.rows
    else:
        forms["dz"] = plan.backward.dz
    if kernel.issues not in forms:
        raise ValueError(f"instructions are counted of {', '.join(forms)} at d = {d}, got the kernel {kernel.issues}")
    return kernel.issues, keeps and kernel.issues == "persistent", forms[kernel.issues]


def key(kernel: Kernel, plan: Plan, keeps: bool, d: int) -> str:
    """A kernel's name among the counts; wider layers compile to what 1024 does."""
    name, is_keeping, tile = configuration(kernel, plan, keeps, d)
    width = "" if name == "dz" else f" {min(d, 1024)}"
    return f"{name}{width}{' keeps' if is_keeping else ''} {' '.join(map(str, tile))}"


def instructions_us(kernel: Kernel, plan: Plan, keeps: bool, d: int, count: Count) -> tuple[float, float, int]:
    """(what follows or stands in the product's steps, what hides behind products, programs on a multiprocessor)."""
    name, _, tile = configuration(kernel, plan, keeps, d)
    across = 1 if name == "narrow" else -(-d // tile.BLOCK_N)
    tiles = -(-M // tile.BLOCK_M) * across
    finishing, hidden, residents = count.per_tile, 0.0, count.residents
    if name == "inside":  # its steps make dz; the programs of the first columns write it, too
        writes, reads = count.per_step if across > 1 else count.per_step * 2
        finishing += (writes + (across - 1) * reads) / across * -(-d // tile.BLOCK_K)
    elif name != "narrow" and count.per_step:
        hidden = sum(count.per_step) * -(-d // tile.BLOCK_K)
    if name != "dz":
        residents = min(residents, 2 if name == "narrow" else tile.residents)
    rate = value("multiprocessors") * value("instructions_per_clock") * value("clock_hz") / 1e6
    return tiles * finishing * count.threads / rate, tiles * hidden * count.threads / rate, residents


# ---------------------------------------------------------------------------------------------- time


class Cache:
    """What a pass has touched last, newest at the end."""

    def __init__(self) -> None:
        self.touched: dict[str, int] = {}

    def read_us(self, name: str, size: int) -> float:
        since = 0
        for other, bytes_ in reversed(self.touched.items()):
            since += bytes_
            if other == name and since <= value("cache_bytes"):
                return size / value("cache_bytes_per_s") * 1e6
        return size / value("memory_bytes_per_s") * 1e6

    def touch(self, tensors: dict[str, int]) -> None:
        for name, size in tensors.items():
            self.touched.pop(name, None)
            self.touched[name] = size


def moving_us(kernel: Kernel, cache: Cache) -> float:
    reading = sum(cache.read_us(name, size) for name, size in kernel.reads.items())
    cache.touch(kernel.reads)
    cache.touch(kernel.writes)
    return reading + sum(kernel.writes.values()) / value("memory_bytes_per_s") * 1e6


def time_of(kernel: Kernel, moving: float, issuing: tuple[float, float, int] | None) -> Time:
    products = kernel.flops / value("flops_per_s") * 1e6
    finishing, hidden, residents = issuing or (0.0, 0.0, 2)
    overlapped = max(products, finishing + hidden)
    computing = max(products + finishing, finishing + hidden) if residents == 1 else overlapped
    return Time(kernel.name, max(moving, computing) + value("launch_us"), max(moving, overlapped) + value("launch_us"))


def times(kernels: list[Kernel], plan: Plan | None, keeps: bool, d: int, counts: dict[str, Count]) -> list[Time]:
    cache, found = Cache(), []
    for kernel in kernels:
        issuing = None
        if plan is not None and kernel.issues is not None:
            name = key(kernel, plan, keeps, d)
            if name not in counts:
                raise ValueError(f"there is no count for {name}: run python bench/predict.py --write")
            issuing = instructions_us(kernel, plan, keeps, d, counts[name])
        found.append(time_of(kernel, moving_us(kernel, cache), issuing))
    return found


# ---------------------------------------------------------------------------------------------- the others


def product(size: Size) -> Kernel:
    return Kernel("product", {"x": size.x, "w": size.w}, {"z": size.z}, flops=_flops(size))


def compiled(size: Size, trains: bool) -> list[Kernel]:
    up = [product(size), Kernel("pointwise", {"z": size.z, "x": size.x}, {"y": size.z})]
    if not trains:
        return up
    parts = {"parts of db": size.M // 128 * size.N * 4}
    return [
        *up,
        Kernel("dz", {"g": size.z, "z": size.z}, {"dz": size.z, **parts}),
        Kernel("db", parts, {"db": size.b}),
        Kernel("dx", {"dz": size.z, "w": size.w, "g": size.z}, {"dx": size.x}, flops=_flops(size)),
        Kernel("dw", {"dz": size.z, "x": size.x}, {"dw": size.w}, flops=_flops(size)),
    ]


def eager(size: Size, trains: bool) -> list[Kernel]:
    up = [
        product(size),
        Kernel("gelu", {"z": size.z}, {"φ": size.z}),
        Kernel("sum", {"φ": size.z, "x": size.x}, {"y": size.z}),
    ]
    if not trains:
        return up
    return [
        *up,
        Kernel("dz", {"g": size.z, "z": size.z}, {"dz": size.z}),
        Kernel("dx", {"dz": size.z, "w": size.w}, {"dz w": size.x}, flops=_flops(size)),
        Kernel("dw", {"dz": size.z, "x": size.x}, {"dw": size.w}, flops=_flops(size)),
        Kernel("db", {"dz": size.z}, {"db": size.b}),
        Kernel("sum at x", {"dz w": size.x, "g": size.z}, {"dx": size.x}),
    ]


def _flops(size: Size) -> int:
    return 2 * size.M * size.N * size.K
