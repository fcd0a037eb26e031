"""The C++ engine on integers, as `exact.py` has it: each of its ways, in every dtype, at the edges of its blocks.

python bench/exact_cpu.py [--seeds 4]      exits with 1 on any mismatch
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import torch
from integers import LAYERS, PROJECTED, compare, integers, truth_of
from torch import Tensor

from fusedres import dispatch, ops
from fusedres.dispatch import Eager, Way
from fusedres.kernels.spec import WAYS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
EVERY_LAYER = LAYERS | {f"{name}-projection": layer for name, layer in PROJECTED.items()}
# rows and widths (N, K) on either side of the blocks that a way works in
ROWS = {
    "lanes": (1, 15, 16, 17, 33, 64, 65, 257),
    "dots": (1, 2, 3, 4),
    "blocks": (1, 15, 16, 17, 64, 65, 127, 129),
    "layers": (1, 17, 128, 129, 257, 300),
}
WIDTHS = {
    "lanes": ((1, 1), (1, 15), (4, 3), (7, 8), (15, 15), (17, 33), (64, 40), (128, 2)),
    "dots": ((1, 16), (15, 17), (33, 16), (300, 33), (64, 300)),
    "blocks": ((16, 16), (17, 33), (63, 64), (65, 64), (130, 127), (1, 100)),
    "layers": ((129, 129), (130, 64), (257, 131), (3, 192), (300, 1)),
}


class Case(NamedTuple):
    """A layer x [M, K], weight [N, K] that goes one way."""

    way: str
    mode: str
    layer: str
    M: int
    N: int
    K: int
    recompute: bool

    def __str__(self) -> str:
        memory = "recompute" if self.recompute else "keep"
        return f"{self.way}-{self.mode}-{self.layer}-{self.M}x{self.N}x{self.K}-{memory}"


def cases(way: str, mode: str) -> Iterator[Case]:
    """Every layer at every size, those with an identity of as many features as go in; one in two recomputes."""
    sizes = product(EVERY_LAYER.items(), ROWS[way], WIDTHS[way])
    for i, ((name, layer), M, (N, K)) in enumerate(sizes):
        is_square = layer.spec.skip == "identity"
        yield Case(way, mode, name, M, N, N if is_square else K, i % 2 == 1)


def mismatches(case: Case, seed: int) -> list[str]:
    """What the engine wrote that is not equal to the truth, each with its number of wrong elements."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{case} {seed}".encode()))
    dtype, subject = DTYPES[case.mode], EVERY_LAYER[case.layer]
    spec = subject.spec._replace(recompute=case.recompute)

    def make(name: str, *shape: int) -> Tensor:
        return integers(name, shape, case.K, draw).to(dtype).requires_grad_()

    operands = subject.operands(case.M, case.N, case.K, make)
    if operands.seed is not None:
        operands = operands._replace(seed=torch.randint(2**62, (), generator=draw))
    columns = case.N + (case.K if spec.skip == "concat" else 0)
    g = integers("g", (case.M, columns), case.K, draw).to(dtype)
    y, _, _, gradients = truth_of(operands, spec, g)
    with going(case.way):
        found = ops.residual_linear(operands, spec)
        names = [name for name, t in operands._asdict().items() if t is not None and name != "seed"]
        slopes = torch.autograd.grad(found, [getattr(operands, name) for name in names], g)
        with torch.no_grad():
            alone = ops.residual_linear(operands, spec)
    pairs = {name: (slope, gradients[name]) for name, slope in zip(names, slopes, strict=True)}
    return compare({"y": (found.detach(), y), "y without gradients": (alone, y), **pairs})


@contextmanager
def going(name: str) -> Iterator[None]:
    """Every layer and network of the CPU engine goes this way."""
    before, way = dispatch.cpu_way, Way(WAYS.index(name), name, "it is told to")
    dispatch.cpu_way = lambda M, widths, dtype: way
    try:
        yield
    finally:
        dispatch.cpu_way = before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    seeds = range(parser.parse_args().seeds)
    os.environ["TRITON_INTERPRET"] = "0"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    count = failed = 0
    for way, (mode, dtype) in product(WAYS, DTYPES.items()):
        choice = dispatch.backend(torch.device("cpu"), dtype)
        if isinstance(choice, Eager):
            print(f"{way} in {mode} is left out: {choice.because}")
            continue
        for case in cases(way, mode):
            wrong = [f"seed {seed}: {text}" for seed in seeds for text in mismatches(case, seed)]
            count, failed = count + 1, failed + bool(wrong)
            for text in wrong[:3]:
                print(f"{case}: {text}", flush=True)
    print(f"cases: {count}, failed: {failed}, threads: {torch.get_num_threads()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
