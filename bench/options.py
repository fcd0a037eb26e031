"""Does every option compile? Each combination's kernels for one GPU, with one small tile, on a machine without one.

    python bench/options.py --arch sm_90

The interpreter executes what a compiler may refuse, so the tests alone would not tell. Exits with 1 on any refusal.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import launches
import torch
from compiled import ARCHES, compiled  # before triton: it sees to it that kernels compile
from configurations import Layer

from fusedres.kernels.config import Tile
from fusedres.kernels.spec import LayerSpec

TILE = Tile(16, 16, 16, 4, 2)
SKIPS = ("none", "identity", "residual", "projection", "concat")
ACTIVATIONS = ("gelu", "none")  # with a slope, and without; the others are lens's and the tests' affair


def layers() -> Iterator[tuple[Layer, bool]]:
    """(layer, whether z is kept) over orders, skips, learned and fixed scales, dropped rows and memory policies."""
    for activation, order, skip in product(ACTIVATIONS, ("pre", "post"), SKIPS):
        if order == "post" and skip == "concat":
            continue
        for is_learned, drops, keeps in product((False, True), (False, True), (False, True)):
            if drops and (skip == "none" or not keeps):  # what drops rows is the same with and without z
                continue
            spec = LayerSpec(activation, order, skip, 0.5, 2.0, 0.5 if drops else 0.0, not keeps)
            yield Layer(spec, is_learned, has_residual=skip == "residual"), keeps


def refusals(case: tuple[str, Layer, bool]) -> list[str]:
    """What the compiler said against the three kernels of a layer, in bf16."""
    arch, layer, keeps = case
    said = []
    for kernel, launch in launches.launches(layer, torch.bfloat16, "ieee", TILE, 48, keeps).items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # ptxas is talkative
                compiled(launch, ARCHES[arch], is_ragged=False)
        except Exception as error:
            said.append(f"{kernel}: {layer}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHES, default="sm_90")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()

    start = time.perf_counter()
    cases = [(options.arch, *case) for case in layers()]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            said = [line for lines in pool.map(refusals, cases) for line in lines]
    for line in said:
        print(line)
    print(f"{len(cases)} layers compiled in {time.perf_counter() - start:.0f} s, {len(said)} kernels refused")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
