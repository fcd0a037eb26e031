"""Everything that is timed, in one table: networks, layers, stacks of equal layers, blocks of two; and their sources.

    z = x Wᵀ + b        y = λ x + φ(z) where sizes agree, else φ(z)        x [M, d₀], sizes [d₀, …, d_L]

Every layer is followed by φ, the last one too. λ is 1, or with `learns` a tensor of one number for each skip. Other
rules of the skip are `Row.rule`'s. A row of family "network" is trained on the mean squared error of its output; any
other stands within a network: the gradient of y is given, and that of x is wanted.

A row is for the CPU where forward + backward take at most CPU_FLOPS and eager keeps at most CPU_BYTES: beyond, a round
takes minutes, or a machine of 16 GB pages. Convolutions in a residual block are not here: bench/residual.py times the
sum that ends one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch

PASSES = ("F", "FB", "S")  # forward without gradients; forward and backward to every parameter; and AdamW's step on top
DEVICES = ("cpu", "cuda")

CPU_FLOPS = 2e12
CPU_BYTES = 2 << 30

# What two threads of the measured machine reach (a study's figures, not this machine's): products, and one thread's
# nanoseconds per element for gelu, and for the slope that backward adds.
FLOPS_PER_S = 550e9
GELU_NS = 0.16
SLOPE_NS = 0.28
FLOOR_THREADS = 2


class Work(NamedTuple):
    """The bytes that any implementation must move, and the flops of its products."""

    bytes: int
    flops: int


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
    family: str = "network"  # or layer, stack, mlp
    source: str = "this project's own"  # the model or paper it comes from
    activation: str = "gelu"  # φ: gelu, gelu-tanh, relu, none
    # the skip: auto, x where sizes agree; projection, x Pᵀ + p where they do not; or of blocks of two layers,
    # mlp: y = x + fc2(φ(fc1(x))), post: y = φ(x + fc2(φ(fc1(x))))
    rule: str = "auto"
    devices: tuple[str, ...] = ("cpu",)

    def __str__(self) -> str:
        return self.name

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(K, N) of each layer."""
        return list(pairwise(self.sizes))

    @property
    def is_of_blocks(self) -> bool:
        return self.rule in ("mlp", "post")

    @property
    def skips(self) -> list[bool]:
        """Whether something is added after each layer."""
        if self.is_of_blocks:
            return [i % 2 == 1 for i in range(self.depth)]
        return [self.rule == "projection" or K == N for K, N in self.layers]

    @property
    def depth(self) -> int:
        return len(self.sizes) - 1

    @property
    def is_within(self) -> bool:
        """Whether it stands within a network: the gradient of y is given, and that of x wanted."""
        return self.family != "network"

    @property
    def can_stack(self) -> bool:
        """Whether some two layers in a row are square and of one width, so that they fit one [L, N, N]."""
        return not self.is_of_blocks and any(K == N == L for (K, N), (_, L) in pairwise(self.layers))

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

    def narrowed(self, width: int, depth: int) -> Row:
        """At most so wide and deep, in the same proportions; networks keep their sizes, on which their skips depend."""
        if self.family == "network":
            return self
        widest = max(self.sizes)
        sizes = tuple(size * min(width, widest) // widest for size in self.sizes)
        return replace(self, sizes=sizes[: depth + 1])

    def work(self, kind: str) -> Work:
        """M rows, d₀ read, d_L written, P parameters; in numbers, of which each has the dtype's bytes:

            F    M (d₀ + d_L) + P            x read, y written; every parameter read once
            FB   F + M (d₀ + d_L) + 2 P      x and the gradient of y, or the target, read; parameters read again, and
                                             their gradients written; M d₀ more where the gradient of x is
            S    FB + 7 P                    AdamW reads parameter, gradient and two moments, and writes three of them

        What lies between layers need not pass through memory, since it can be computed again. Flops: 2 M K N for each
        product, of which backward has two for each, but for the first layer where nobody wants the gradient of x.
        """
        products = [2 * self.M * N * K for K, N in self.layers]
        factors = 2 if self.rule == "projection" else 1  # of a layer: W, and P
        parameters = factors * sum(N * K + N for K, N in self.layers)
        ends = self.M * (self.sizes[0] + self.sizes[-1])
        numbers, flops = ends + parameters, factors * sum(products)
        if kind != "F":
            numbers += ends + 2 * parameters + (self.M * self.sizes[0] if self.is_within else 0)
            flops = 3 * flops - (0 if self.is_within else factors * products[0])
        if kind == "S":
            numbers += 7 * parameters
        return Work(numbers * self.dtype.itemsize, flops)

    def fits_cpu(self) -> bool:
        """Eager keeps of each layer its input, z and φ(z)."""
        kept = 3 * self.M * sum(self.sizes) * self.dtype.itemsize
        return self.work("FB").flops <= CPU_FLOPS and kept <= CPU_BYTES

    def floor_ms(self, kind: str) -> float | None:
        """The stated floor, else the formula's, where that is known: fp32 networks with gelu, no optimiser."""
        is_counted = self.dtype == torch.float32 and self.family == "network" and self.rule == "auto"
        if not is_counted or self.activation != "gelu" or kind == "S":
            return None
        return self.stated_floor_ms.get(kind, self.computed_floor_ms(kind))

    def computed_floor_ms(self, kind: str) -> float:
        """F   2 M Σ N K flops, and gelu on M Σ N elements
        FB  three products a layer, but no dx for the first one, and gelu and its slope on the elements

        at FLOPS_PER_S, and GELU_NS and SLOPE_NS shared by FLOOR_THREADS. Memory and calls cost nothing here.
        """
        elements = self.M * sum(self.sizes[1:])
        ns = GELU_NS if kind == "F" else GELU_NS + SLOPE_NS
        return 1e3 * self.work(kind).flops / FLOPS_PER_S + 1e-6 * elements * ns / FLOOR_THREADS


# ---------------------------------------------------------------------------------------------- networks


def _bars(forward: float, both: float) -> dict[str, float]:
    return {"F": forward, "FB": both}


_A = {"sizes": (3,) * 13 + (1,), "devices": DEVICES, "source": "a write-up's shape-gated stack: 13 layers of width 3"}
_B = {  # no two neighbours agree: no skip, no λ
    "sizes": (128, 256, 512, 1024, 512, 256, 128, 1),
    "devices": DEVICES,
    "source": "the same write-up's second case, where no two widths agree",
}
_C = {"sizes": (64,) * 17 + (1,), "devices": DEVICES, "source": "neural field: 16 layers of width 64 and a readout"}
_D = {"sizes": (1024,) * 9, "devices": DEVICES, "source": "eight layers of BERT-large's width (Devlin et al. 2019)"}
_E = {"sizes": (1024,) * 2, "devices": DEVICES, "source": "one layer of BERT-large's width (Devlin et al. 2019)"}
_F = {"devices": DEVICES, "source": "very deep residual networks (He et al. 2016, identity mappings)"}

BASE = (
    Row("a1", M=1, bar=_bars(9, 3), **_A),
    Row("a4096", M=4096, bar=_bars(13, 6), **_A),
    Row("a65536", M=65536, bar=_bars(10, 9), **_A),
    Row("b1", M=1, bar=_bars(3.3, 2.2), **_B),
    Row("b512", M=512, bar=_bars(2.1, 1.9), stated_floor_ms={"F": 2.6, "FB": 7.6}, **_B),
    Row("c1", M=1, bar=_bars(14, 3.3), **_C),
    Row("c1024", M=1024, bar=_bars(2.5, 2.4), stated_floor_ms={"F": 0.33}, **_C),
    Row("c65536", M=65536, bar=_bars(2.8, 2.4), stated_floor_ms={"F": 21, "FB": 76}, **_C),
    Row("d-fp32", M=4096, bar=_bars(2.2, 2.1), stated_floor_ms={"F": 125, "FB": 359}, **_D),
    Row("d-bf16", M=4096, dtype=torch.bfloat16, bar=_bars(1.03, 1.2), **_D),
    Row("e", M=8192, bar=_bars(1.9, 1.7), **_E),
    Row("f100", (32,) * 101, 256, bar=_bars(5.5, 3.4), **_F),
    Row("f1000", (16,) * 1001, 64, bar=_bars(28, 4), **_F),
)
DEEP = (  # whose memory is asked for, not their time
    Row("g64", (128,) * 65, 65536),
    *(Row(f"h{width}", (width,) * 1001, 4096) for width in (16, 64, 128)),
)
LEARNED = tuple(
    replace(row, name=f"{row}-learned", learns=True, bar={}, devices=("cpu",)) for row in BASE if any(row.skips)
)
OTHER_SKIPS = tuple(
    Row(f"{name}-m{M}", sizes, M, activation=activation, rule=rule, source=source, devices=DEVICES)
    for M in (10, 4096)
    for name, sizes, activation, rule, source in (
        ("post", (64,) * 17, "relu", "post", "a write-up's blocks of two, ReLU after the sum (He et al. 2015)"),
        ("projected", (128, 64, 32, 16, 8, 1), "gelu", "projection", "a write-up's projections where widths change"),
        ("linear", (64,) * 57, "none", "auto", "a write-up's 56 linear residual layers, y = x + z"),
    )
)

# ---------------------------------------------------------------------------------------------- layers, stacks, blocks

_WIDTHS = {  # those first that tell most
    1024: "BERT-large's width (Devlin et al. 2019)",
    256: "width of deep policy networks (Wang et al. 2025)",
    4096: "LLaMA-7B's width (Touvron et al. 2023)",
    512: "Mixer-S's width (Tolstikhin et al. 2021)",
    64: "width of neural fields (Müller et al. 2021)",
    2048: "GPT-3 1.3B's width (Brown et al. 2020)",
    128: "width of physics-informed networks (Wang et al. 2021)",
    8192: "LLaMA-65B's width (Touvron et al. 2023)",
}
_FIELD, _POLICY = "neural field (Müller et al. 2021)", "deep policy, contrastive RL (Wang et al. 2025)"
_STACKS = (  # width, layers, rows, source
    (64, 8, 1 << 17, "physics-informed network (Raissi et al. 2019, wider)"),
    (64, 4, 1 << 21, _FIELD),
    (256, 64, 512, _POLICY),
    (64, 4, 1 << 14, _FIELD),
    (64, 8, 1 << 21, _FIELD),
    (64, 8, 1 << 14, "physics-informed network (Raissi et al. 2019, wider)"),
    (64, 4, 1 << 17, _FIELD),
    (256, 64, 4096, _POLICY),
    (256, 1000, 512, _POLICY),
)
_MLPS = (  # name, sizes, φ, rows, source
    ("vit", (768, 3072, 768), "gelu", 64 * 197, "ViT-B/16, 64 images (Dosovitskiy et al. 2021)"),
    ("gpt2", (768, 3072, 768), "gelu-tanh", 8 * 1024, "GPT-2 small, 8 × 1024 tokens (Radford et al. 2019)"),
    (
        "mixer-tokens",
        (196, 384, 196),
        "gelu",
        32 * 768,
        "Mixer-B/16, across tokens, 32 images (Tolstikhin et al. 2021)",
    ),
    ("mixer-channels", (768, 3072, 768), "gelu", 32 * 196, "Mixer-B/16, across channels (Tolstikhin et al. 2021)"),
    ("tabular", (256, 512, 256), "relu", 4096, "tabular ResNet without its norm (Gorishniy et al. 2021)"),
    ("llama", (4096, 16384, 4096), "gelu", 4096, "a transformer of LLaMA-7B's width, ungated"),
)


def _by_device(name: str, also_fp32: bool = False, **facts: Any) -> Iterator[Row]:
    """The row as it is for CUDA, in bf16, and for the CPU where it fits, in fp32, as which CUDA may have it too."""
    yield Row(f"{name}-bf16", dtype=torch.bfloat16, devices=("cuda",), **facts)
    row = Row(f"{name}-fp32", **facts)
    devices = (*(["cpu"] if row.fits_cpu() else []), *(["cuda"] if also_fp32 else []))
    if devices:
        yield replace(row, devices=devices)


LAYERS = tuple(
    row
    for M in (65536, 4096)
    for d, source in _WIDTHS.items()
    for activation in ("gelu", "relu", "gelu-tanh")
    if activation == "gelu" or (d in (256, 1024) and M == 65536)  # epilogues that cuBLASLt has too
    for row in _by_device(
        f"layer{'' if activation == 'gelu' else '-' + activation}-d{d}-m{M}",
        sizes=(d, d), M=M, family="layer", activation=activation, source=source,
    )
)  # fmt: skip
STACKS = tuple(
    row
    for d, L, M, source in _STACKS
    for row in _by_device(f"stack-{d}x{L}-m{M}", True, sizes=(d,) * (L + 1), M=M, family="stack", source=source)
)
MLPS = tuple(
    row
    for name, sizes, activation, M, source in _MLPS
    for row in _by_device(
        f"mlp-{name}-m{M}", sizes=sizes, M=M, family="mlp", activation=activation, rule="mlp", source=source
    )
)
ROWS = BASE + LEARNED + OTHER_SKIPS + LAYERS + STACKS + MLPS


def named(name: str) -> Row:
    found = [row for row in (*ROWS, *DEEP) if row.name == name]
    if not found:
        raise ValueError(f"a row must be one of {', '.join(map(str, (*ROWS, *DEEP)))}, got {name}")
    return found[0]


class Run(NamedTuple):
    """What one test measures: a row on a device, in one pass."""

    device: str
    row: Row
    kind: str

    def __str__(self) -> str:
        return f"{self.device}-{self.row}-{self.kind}"

    @property
    def key(self) -> str:
        """Its name in a file of results, where the CPU's go without their device."""
        return str(self).removeprefix("cpu-")


def runs() -> Iterator[Run]:
    """Forward and backward of all rows of a device, by worth, then full steps."""
    for device in DEVICES:
        for kinds in (("F", "FB"), ("S",)):
            yield from (Run(device, row, kind) for row in ROWS if device in row.devices for kind in kinds)
