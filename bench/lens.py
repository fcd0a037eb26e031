"""What every shipped kernel compiles to, without a GPU: registers, spills, shared memory, instructions that matter.

    python bench/lens.py                                              every architecture
    python bench/lens.py --kernel stack_forward stack_backward        runs of layers alone
    python bench/lens.py --arch sm_90 --tile 128,256,64,8,3           any tile, shipped or not

Exits with 1 where a kernel spills, needs more registers or shared memory than its chip has, or does not compile.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import launches
import stack_bytes
import triton
from compiled import ARCHES, Finding, compiled, read  # before triton: it sees to it that kernels compile
from configurations import (
    FORMS,
    KERNELS,
    MODES,
    RECORD_KERNELS,
    STACK_KERNELS,
    SUM_KERNELS,
    Configuration,
    FormConfiguration,
    StackConfiguration,
    SumConfiguration,
    largest,
    name,
    shipped,
    shipped_forms,
    shipped_records,
    shipped_stacks,
    shipped_sums,
)
from launches import HEAVY, PLAIN, RECORDED, SCALED, Job

from fusedres.kernels.config import Tile

# ---------------------------------------------------------------------------------------------- what to compile


def jobs(arch: str, configurations: list[Configuration], is_quick: bool) -> Iterator[Job]:
    """The heaviest kernel of every tile; of the largest, ragged and plain kernels and costly activations too.

    On sm_90 a plain kernel of every tile, unless quick. fp16 compiles to what bf16 does, so its largest tiles suffice.
    """
    heaviest = {(c.kernel, c.mode, c.is_ragged, c.tile): c for c in configurations}  # of equals, with a projection
    large = set(largest(configurations))
    for (kernel, mode, is_ragged, _), c in heaviest.items():
        is_largest = c in large or c._replace(has_projection=False) in large
        if not is_largest and (mode == "fp16" or is_ragged):
            continue
        yield Job(arch, c)
        if is_ragged:
            continue
        if is_largest or (arch == "sm_90" and not is_quick):
            plain = c._replace(has_projection=False)
            yield Job(arch, plain if plain in configurations else c, load=PLAIN)
        if kernel == "dx" and is_largest and mode != "fp16":
            yield Job(arch, c, load=RECORDED)
        if is_largest and kernel != "dx" and mode != "fp16":
            yield from (Job(arch, c, activation) for activation in ("gelu_tanh", "sin"))


def stack_jobs(arch: str, configurations: list[StackConfiguration], is_quick: bool) -> Iterator[Job]:
    """Every tile in runs that drop rows and recompute, and in runs that do neither; padded widths in the latter alone.

    On sm_90 plain runs and costly activations too, unless quick. fp16 compiles to what bf16 does: its d = 64 suffices.
    """
    for c in configurations:
        if (c.mode == "fp16" and c.width != 64) or (c.is_ragged and is_quick):
            continue
        yield Job(arch, c, load=SCALED)
        if c.is_ragged:
            continue
        yield Job(arch, c, load=HEAVY)
        if c.kernel == "stack_backward":
            yield Job(arch, c, load=RECORDED)
        if arch == "sm_90" and not is_quick:
            yield Job(arch, c, load=PLAIN)
            yield from (Job(arch, c, activation, SCALED) for activation in ("gelu_tanh", "sin"))


def form_jobs(arch: str, configurations: list[FormConfiguration]) -> Iterator[Job]:
    """Every tile of the other forms, plain and heavy; of narrow layers also while they record."""
    for c in configurations:
        yield Job(arch, c, load=PLAIN)
        yield Job(arch, c, load=HEAVY)
        if c.kernel == "narrow" and c.mode != "fp16":
            yield Job(arch, c, load=RECORDED)


# ---------------------------------------------------------------------------------------------- compiling


def compile_job(job: Job) -> tuple[Job, Finding]:
    try:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            built = compiled(launches.of(job), ARCHES[job.arch], getattr(job.configuration, "is_ragged", False))
    except Exception as error:
        return job, Finding(error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return job, read(built, log.getvalue())


def _faults(job: Job, finding: Finding) -> str:
    """Spills are none while recording: its tiles are those of the kernel that does not, so that bits are the same."""
    residents = getattr(job.configuration.tile, "residents", 1)
    return (finding._replace(spilled=0) if job.load == RECORDED else finding).faults(job.arch, residents)


# ---------------------------------------------------------------------------------------------- reporting

COLUMNS = {
    "regs": "registers",
    "spill B": "spilled",
    "local B": "local",
    "shared B": "shared",
    "mma": "products",
    "mma A=reg": "from_registers",
    "serial": "serialized",
    "bulk": "bulk_copies",
    "async": "async_copies",
    "loads": "loads",
    "16 B": "wide_loads",
    "LDL/STL": "local_memory",
    "all": "instructions",
}


def table(findings: dict[Job, Finding]) -> str:
    header = f"{'kernel':<15}{'mode':<5}{'tile':<22}{'layer':<11}{'widths':<10}{'load':<7}{'φ':<10}"
    lines = []
    for arch in dict.fromkeys(job.arch for job in findings):
        lines += ["", f"{arch}", header + " ".join(f"{title:>8}" for title in COLUMNS)]
        for job, found in findings.items():
            if job.arch != arch:
                continue
            left = f"{_label(job.configuration)}{job.load:<7}{job.activation:<10}"
            right = found.error or " ".join(f"{int(getattr(found, field)):>8}" for field in COLUMNS.values())
            lines.append(left + right)
    return "\n".join(lines)


def _label(c: Configuration | StackConfiguration | SumConfiguration | FormConfiguration) -> str:
    if isinstance(c, FormConfiguration):
        tile, layer, widths = name(c.tile), "keeps" if c.keeps else "", f"{c.N}x{c.K}"
    elif isinstance(c, SumConfiguration):
        tile, layer, widths = name(c.tile), f"a by {c.per}", str(c.length + c.is_ragged)
    elif isinstance(c, StackConfiguration):
        tile, layer, widths = name(c.tile), "", str(c.d)
        if c.kernel == "stack_backward":
            layer = "sums dw" if c.sums_weight else "writes dz"
    else:
        tile, layer = name(c.tile), "projection" if c.has_projection else "tensor"
        widths = "ragged" if c.is_ragged else "aligned"
    return f"{c.kernel:<15}{c.mode:<5}{tile:<22}{layer:<11}{widths:<10}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHES, help="default: all; with --quick, sm_90")
    every_kernel = KERNELS + FORMS + STACK_KERNELS + SUM_KERNELS + RECORD_KERNELS
    parser.add_argument("--kernel", nargs="+", choices=every_kernel, default=every_kernel)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--aligned", action="store_true", help="leave out widths that are no multiples of 16")
    parser.add_argument("--tile", metavar="M,N,K,WARPS,STAGES", help="this tile in the place of the shipped ones")
    parser.add_argument("--quick", action="store_true", help="sm_90, and plain kernels of the largest tiles alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()

    start = time.perf_counter()
    widths = (False,) if options.aligned else (False, True)
    queue: list[Job] = []
    for arch in options.arch or (["sm_90"] if options.quick else ARCHES):
        if options.tile:
            tile = Tile(*map(int, options.tile.split(",")))
            queue += [
                Job(arch, Configuration(kernel, mode, has_projection, is_ragged, tile), load=load)
                for kernel, mode in product([k for k in options.kernel if k in KERNELS], options.mode)
                for has_projection, is_ragged, load in product((False, True), widths, (PLAIN, HEAVY))
            ]
        else:
            target, capability = ARCHES[arch].dispatch, launches.CAPABILITY.get(arch, 0)
            every = [c for c in shipped(target, capability) if c.is_ragged in widths]
            chosen = [c for c in every if c.kernel in options.kernel and c.mode in options.mode]
            queue += jobs(arch, chosen, options.quick)
            stacks = [c for c in shipped_stacks(target, capability) if c.is_ragged in widths]
            runs = [c for c in stacks if c.kernel in options.kernel and c.mode in options.mode]
            queue += stack_jobs(arch, runs, options.quick)
            forms = [c for c in shipped_forms(target, capability) if c.kernel in options.kernel]
            queue += form_jobs(arch, [c for c in forms if c.mode in options.mode])
            sums = [c for c in shipped_sums() if c.is_ragged in widths and c.mode in options.mode]
            records = [c for c in shipped_records() if c.mode in options.mode]
            queue += [Job(arch, c, "none") for c in sums + records if c.kernel in options.kernel]

    found: dict[Job, Finding] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            for future in as_completed([pool.submit(compile_job, job) for job in queue]):
                job, found[job] = future.result()
                if len(found) % 50 == 0 or len(found) == len(queue):
                    done = f"{len(found)} of {len(queue)} kernels"
                    print(f"compiled {done} in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    found = {job: found[job] for job in queue}

    print(table(found))
    failures = {str(job): faults for job, finding in found.items() if (faults := _faults(job, finding))}
    if options.json:
        rows = [{**job._asdict(), **job.configuration._asdict(), **finding._asdict()} for job, finding in found.items()]
        kernels = ",\n".join(json.dumps({k: v for k, v in row.items() if k != "configuration"}) for row in rows)
        record = f'"triton": "{triton.__version__}", "failures": {json.dumps(failures)}, "kernels": [\n{kernels}\n]'
        options.json.write_text(f"{{{record}}}\n")
    if set(options.kernel) & set(STACK_KERNELS):
        print(f"\n{stack_bytes.table(65536, 32)}")
    print(f"\n{len(found)} kernels in {time.perf_counter() - start:.0f} s, {len(failures)} at fault")
    for which, faults in failures.items():
        print(f"    {which}: {faults}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
