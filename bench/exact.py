"""Every shipped kernel on integers small enough that each result is exact, compared with == against float64.

    python bench/exact.py --seeds 8 --out exact.json    every configuration
    python bench/exact.py --quick                       the largest tiles alone, in Triton's interpreter without a GPU

A single lost or doubled term shows, whatever rounding would hide. Exits with 1 on any mismatch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from configurations import (
    FORMS,
    KERNELS,
    MODES,
    STACK_KERNELS,
    Configuration,
    Layer,
    Stack,
    StackConfiguration,
    everything,
    largest,
    shipped,
    shipped_forms,
    shipped_stacks,
)
from exact_forms import FormCase, form_cases, form_mismatches
from integers import DEVICE, HAS_GPU, LAYERS, PROJECTED, compare, drawn, truth_of  # before triton
from timing import machine
from torch import Tensor

from fusedres import assembler, reference
from fusedres.kernels.config import Separate, StackTiles, Tile
from fusedres.kernels.spec import LayerSpec, Operands, Run, Wanted
from fusedres.kernels.triton import layer, layer_backward, stack, stack_backward

GPU = torch.cuda.get_device_name() if HAS_GPU else ""
TARGET = ("hip" if torch.version.hip else "cuda") if HAS_GPU else "interpreter"
ANY_TILE = Tile(16, 16, 16, 4, 2)  # for dz where dx is in question

HEAVIEST = {"forward": "everything", "dz": "everything", "dx": "identity"}


STACKS = {
    "everything": Stack("relu", "post", is_learned=True, drops=True),
    "pre": Stack("relu", is_learned=True),
    "bare": Stack("none", has_skip=False),
}
EVERY_KERNEL = KERNELS + FORMS + STACK_KERNELS
DEPTH = 3  # layers, of which the second drops rows


class Case(NamedTuple):
    """A configuration on a layer: x [M, K], weight [N, K]."""

    configuration: Configuration
    layer: str
    M: int
    N: int
    K: int

    def __str__(self) -> str:
        return f"{self.configuration}-{self.layer}-{self.M}x{self.N}x{self.K}"


def cases(configurations: Iterable[Configuration], is_small: bool) -> list[Case]:
    """Each configuration on the layer that asks most of its kernel, the largest ones on every layer."""
    configurations = list(configurations)
    large = set(largest(configurations))
    found = []
    for c in configurations:
        layers = PROJECTED if c.has_projection else LAYERS
        names = layers if c in large else [HEAVIEST[c.kernel] if not c.has_projection else "everything"]
        found += [Case(c, name, *_sizes(c, layers[name], is_small)) for name in names]
    return found


def _sizes(c: Configuration, subject: Layer, is_small: bool) -> tuple[int, int, int]:
    """A few tiles each way, the last ones part empty; large: enough programs to fill a GPU, and a deep product."""
    columns, depth = (c.tile.BLOCK_N, c.tile.BLOCK_K) if c.kernel != "dx" else (c.tile.BLOCK_K, c.tile.BLOCK_N)
    more = 5 if c.is_ragged else 16
    if is_small:
        M, N, K = c.tile.BLOCK_M + 3, columns + more, depth + more
    else:
        M, N, K = 32 * c.tile.BLOCK_M + 3, 4 * columns + more, 12 * depth + more
    return (M, N, N) if subject.spec.skip == "identity" else (M, N, K)


class StackCase(NamedTuple):
    """A configuration on a run of layers: x [M, d]."""

    configuration: StackConfiguration
    stack: str
    M: int

    def __str__(self) -> str:
        return f"{self.configuration}-{self.stack}-{self.M}"


def stack_cases(configurations: Iterable[StackConfiguration], is_small: bool) -> list[StackCase]:
    """Each configuration on every run; three tiles of rows, the last one part empty, or many for a GPU."""
    tiles = 2 if is_small else 300
    return [StackCase(c, name, tiles * c.tile.BLOCK_M + 3) for c in configurations for name in STACKS]


AnyCase = Case | StackCase | FormCase


def capability() -> int:
    """Of this GPU, as dispatch has it; in the interpreter, which knows descriptors, the first that has them."""
    if not HAS_GPU:
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


# ---------------------------------------------------------------------------------------------- one case


def mismatches(case: Case, seed: int) -> list[str]:
    """What the case's kernel wrote that is not equal to the truth, each with its number of wrong elements."""
    c = case.configuration
    dtype, precision = MODES[c.mode]
    subject = (PROJECTED if c.has_projection else LAYERS)[case.layer]
    spec = subject.spec
    draw = torch.Generator().manual_seed(zlib.crc32(f"{case} {seed}".encode()))
    operands, g = drawn(subject, case.M, case.N, case.K, draw, dtype)
    y, kept, s, gradients = truth_of(operands, spec, g)

    if c.kernel == "forward":
        got = layer.forward(operands, spec, dtype, c.tile, precision, True, spec.skip == "projection")
        return compare({"y": (got[0], y), "kept": (got[1], kept), "s": (got[2], s)})

    every = everything(operands)
    wanted = Wanted(*(name == "x" for name in Wanted._fields)) if c.kernel == "dx" else every._replace(x=False)
    found = []
    for recomputes in (False, True) if c.kernel == "dz" else (False,):
        left = (None, None) if recomputes else (kept.to(operands.kept_dtype), None if s is None else s.to(dtype))
        form = Separate(ANY_TILE if c.kernel == "dx" else c.tile, c.tile)
        gradient = layer_backward.backward(g, operands, *left, spec, wanted, form, None, precision, 1)
        pairs = {name: (t, gradients[name]) for name, t in gradient._asdict().items() if t is not None}
        found += compare(pairs, " recomputing z" if recomputes else "")
    return found


def stack_mismatches(case: StackCase, seed: int) -> list[str]:
    """Likewise for a run's kernel, keeping every h or every other one."""
    c = case.configuration
    dtype, precision = MODES[c.mode]
    subject = STACKS[case.stack]
    draw = torch.Generator().manual_seed(zlib.crc32(f"{case} {seed}".encode()))

    def make(name: str, *shape: int) -> Tensor:
        values = torch.randint(-1, 2, shape, generator=draw).double()
        if name == "weight":  # two in a row and column, or so
            values *= torch.rand(shape, generator=draw) < 3 / c.d
        if name in ("skip_scale", "branch_scale"):
            values = torch.tensor([-1.0, 1.0])[torch.randint(2, shape, generator=draw)]
        return values.to(DEVICE, dtype)

    x, run, g = make("x", case.M, c.d), subject.run(DEPTH, c.d, make), make("g", case.M, c.d)
    if run.seeds is not None:
        run = run._replace(seeds=torch.randint(2**62, (DEPTH,), generator=draw).to(DEVICE))
    hs, gradients = stack_truth(x, run, g)
    tiles = StackTiles(c.tile, c.tile)
    found = []
    for keep_every in (1, 2):
        y, kept = stack.forward(x, run, c.tile, precision, keep_every)
        when = f" keeping every {keep_every}"
        if c.kernel == "stack_forward":
            found += compare({"y": (y, hs[-1]), "kept": (kept, torch.stack(hs[keep_every:-1:keep_every]))}, when)
            continue
        programs = 2 if case.M < 3 * c.tile.BLOCK_M else 132
        gradient = stack_backward.backward(
            g, x, kept, run, subject.wanted(), tiles, precision, keep_every, programs, c.sums_weight
        )
        pairs = {name: (t, gradients[name]) for name, t in gradient._asdict().items() if t is not None}
        assert pairs.keys() == gradients.keys()
        found += compare(pairs, when)
    return found


def stack_truth(x: Tensor, run: Run, g: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Every h and every gradient from the reference in float64."""
    names = [
        name for name in ("weight", "bias", "skip_scale", "branch_scale") if isinstance(getattr(run, name), Tensor)
    ]
    wide = {"x": x.double().requires_grad_()} | {name: getattr(run, name).double().requires_grad_() for name in names}
    hs = [wide["x"]]
    for i in range(DEPTH):
        own = {name: wide[name][i] for name in names}
        scales = {} if "branch_scale" in own else {"branch_scale": run.branch_scale}
        spec = LayerSpec(run.activation, run.order, "identity" if run.has_skip else "none", **scales)
        if run.seeds is not None and i % 2:
            own["seed"], spec = run.seeds[i].cpu(), spec._replace(drop_path=0.5)
        hs.append(reference.layer(Operands(hs[-1], **own), spec))
    found = torch.autograd.grad(hs[-1], [*wide.values(), *hs[1:]], g.double())
    for value in (*hs, *found[len(wide) :]):
        if not torch.equal(value, value.to(x.dtype).double()):
            raise AssertionError("an h, or its gradient, is not representable: draw smaller integers")
    return [h.detach() for h in hs], dict(zip(wide, found, strict=False))


# ---------------------------------------------------------------------------------------------- all cases


def run(case: AnyCase, seeds: int) -> tuple[AnyCase, list[str]]:
    """The case's mismatches over all seeds."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        kinds = {StackCase: stack_mismatches, FormCase: form_mismatches, Case: mismatches}
        found = kinds[type(case)]
        return case, [f"seed {seed}: {text}" for seed in range(seeds) for text in found(case, seed)]
    except Exception as error:
        return case, [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="the largest tiles alone, on small sizes")
    parser.add_argument("--kernel", nargs="+", choices=EVERY_KERNEL, default=EVERY_KERNEL)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="0: all in this process")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="leave out what is not begun by then")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--record", type=Path, metavar="FILE", help="where all has passed, add the sweep to this file")
    options = parser.parse_args()

    start = time.perf_counter()
    modes = options.mode if HAS_GPU else [mode for mode in options.mode if mode != "bf16"]
    if modes != options.mode:
        print("bf16 is left out: Triton's interpreter computes its products wrongly")
    chosen = [c for c in shipped(TARGET, capability(), GPU) if c.kernel in options.kernel and c.mode in modes]
    if options.quick:
        chosen = largest(chosen)
    is_small = options.quick or not HAS_GPU
    stacks = [c for c in shipped_stacks(TARGET, capability()) if c.kernel in options.kernel and c.mode in modes]
    queue = [*cases(chosen, is_small), *stack_cases(stacks, is_small)]

    forms = [
        c
        for c in shipped_forms("hip" if TARGET == "hip" else "cuda", capability(), GPU)
        if c.kernel in options.kernel and c.mode in modes
    ]
    queue = [*form_cases(forms, is_small), *queue]

    found: dict[AnyCase, list[str]] = {}
    for case, wrong in _results(queue, options.seeds, options.jobs, start + options.budget_s):
        found[case] = wrong
        for text in wrong[:3]:
            print(f"{case}: {text}", flush=True)
        if len(found) % 100 == 0 or len(found) == len(queue):
            print(f"{len(found)} of {len(queue)} cases in {time.perf_counter() - start:.0f} s", flush=True)

    report: dict[str, dict[str, Any]] = {}
    for case, wrong in found.items():
        entry = report.setdefault(str(case.configuration), {"cases": 0, "failed": 0, "mismatches": []})
        entry["cases"] += 1
        entry["failed"] += bool(wrong)
        entry["mismatches"] += [f"{case}: {text}" for text in wrong[:4]]
    failed = sum(map(bool, found.values()))
    summary = {
        "device": torch.cuda.get_device_name() if HAS_GPU else "Triton's interpreter",
        "seeds": options.seeds,
        "cases": len(found),
        "failed": failed,
        "not_run": [str(case) for case in queue if case not in found],
        "seconds": round(time.perf_counter() - start, 1),
    }
    if options.out:
        options.out.write_text(json.dumps(summary | {"configurations": report}, indent=1) + "\n")
    is_whole = not options.quick and modes == list(MODES) and options.kernel == EVERY_KERNEL
    if options.record and HAS_GPU and is_whole and not failed and not summary["not_run"]:
        record_sweep(options.record, summary)
    print(", ".join(f"{key}: {len(value) if isinstance(value, list) else value}" for key, value in summary.items()))
    return 1 if failed else 0


def record_sweep(path: Path, summary: dict[str, Any]) -> None:
    """That every shipped configuration was exact on this GPU, under the assembler that made it: `assembler.SWEPT`."""
    found = json.loads(path.read_text()) if path.is_file() else {"sweeps": []}
    facts = machine()
    sweep = {"gpu": facts["device"], **{name: facts[name] for name in ("triton", "torch", "commit", "date")}}
    found["sweeps"].append(sweep | {"ptxas": assembler.ptxas(), "seeds": summary["seeds"], "cases": summary["cases"]})
    path.write_text(json.dumps(found, indent=1) + "\n")


def _results(queue: list[AnyCase], seeds: int, jobs: int, deadline: float) -> Iterable[tuple[AnyCase, list[str]]]:
    """(case, mismatches) as they come: many processes, since most of the time goes into compiling."""
    if jobs == 0:
        for case in queue:
            if time.perf_counter() > deadline:
                return
            yield run(case, seeds)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, case, seeds) for case in queue]
        for future in as_completed(futures):
            if time.perf_counter() > deadline:
                pool.shutdown(cancel_futures=True, wait=False)
                return
            yield future.result()


if __name__ == "__main__":
    sys.exit(main())
