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
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # triton reads it as it defines kernels; interpreted ones do not compile
os.environ["TRITON_DUMP_PTXAS_LOG"] = os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a kernel out of a cache has no log

import stack_bytes
import torch
import triton
from configurations import (
    KERNELS,
    MODES,
    STACK_KERNELS,
    SUM_KERNELS,
    Configuration,
    Layer,
    Stack,
    StackConfiguration,
    SumConfiguration,
    everything,
    largest,
    name,
    shipped,
    shipped_stacks,
    shipped_sums,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedres.kernels.config import StackTiles, Tile, Tiles
from fusedres.kernels.record import Recording
from fusedres.kernels.spec import LayerSpec, Terms, WantedTerms
from fusedres.kernels.triton import layer, layer_backward, residual, stack, stack_backward


class Arch(NamedTuple):
    target: GPUTarget
    dispatch: str  # what dispatch calls it
    shared: int  # bytes of shared memory that one program can have


ARCHES = {
    "sm_80": Arch(GPUTarget("cuda", 80, 32), "cuda", 99 * 1024),  # of 8.6 and 8.9, which run the same; 8.0 has 163
    "sm_90": Arch(GPUTarget("cuda", 90, 32), "cuda", 227 * 1024),
    "sm_100": Arch(GPUTarget("cuda", 100, 32), "cuda", 227 * 1024),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), "hip", 64 * 1024),
}
NVIDIA_REGISTERS = 64 * 1024  # that one program can have
NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
ALIGNED, RAGGED = 1024, 1003  # widths: multiples of 16, which kernels are specialised for, and not

# by what they are: one product and a skip; everything that a kernel can do at once, backward recomputing z
PLAIN, HEAVY = "plain", "heavy"
SCALED = "scaled"  # of runs: all but dropped rows, whose loops the compiler does not pipeline
RECORDED = "recorded"  # backward, plain but for what it records of the gradient; slower where it spills, and no fault


class Job(NamedTuple):
    """One kernel to compile."""

    arch: str
    configuration: Configuration | StackConfiguration | SumConfiguration
    activation: str = "gelu"
    load: str = HEAVY

    def __str__(self) -> str:
        return f"{self.arch} {self.configuration} {self.load} {self.activation}"


class Finding(NamedTuple):
    """What a kernel compiled to. Bytes are per thread, shared memory per program; counts are of instructions."""

    registers: int = 0
    threads: int = 0  # of a program on NVIDIA's, where more registers than there are fail at the launch alone
    spilled: int = 0  # bytes that registers had no room for
    local: int = 0  # bytes of arrays in local memory, such as sin's slow path has
    shared: int = 0
    products: int = 0  # on matrix units
    from_registers: int = 0  # Hopper's, whose operand A is in registers
    serialized: bool = False  # ptxas could not keep Hopper's products in flight
    bulk_copies: int = 0  # TMA
    async_copies: int = 0
    loads: int = 0
    wide_loads: int = 0  # of 16 bytes
    local_memory: int = 0  # loads and stores
    error: str = ""

    def faults(self, arch: str) -> str:
        limit, taken = ARCHES[arch].shared, self.registers * self.threads
        return ", ".join(
            text
            for text, is_so in (
                (self.error, self.error),
                (f"spills {self.spilled} bytes", self.spilled > 0),
                (f"needs {self.shared} bytes of shared memory, has {limit}", self.shared > limit),
                (f"needs {taken} registers, has {NVIDIA_REGISTERS}", taken > NVIDIA_REGISTERS),
            )
            if is_so
        )


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


# ---------------------------------------------------------------------------------------------- compiling


Launch = tuple[Any, tuple, dict[str, Any]]  # kernel, arguments, keyword arguments


def compile_job(job: Job) -> tuple[Job, Finding]:
    c = job.configuration
    dtype, precision = MODES[c.mode]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            if isinstance(c, SumConfiguration):
                found = sum_launches(c, dtype)
            elif isinstance(c, StackConfiguration):
                found = stack_launches(job, dtype, precision)
            else:
                width, keeps = (RAGGED if c.is_ragged else ALIGNED), job.load != HEAVY
                recording = _recording() if job.load == RECORDED else None
                found = launches(_layer(job), dtype, precision, c.tile, width, keeps, recording)
            built = compiled(found[c.kernel], ARCHES[job.arch], c.is_ragged)
    except Exception as error:
        return job, Finding(error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    read = _read_amdgcn if "amdgcn" in built.asm else _read_cubin
    return job, read(built, log.getvalue())


def compiled(launch: Launch, arch: Arch, is_ragged: bool) -> Any:
    """The kernel with the arguments that its launcher gives it, specialised as Triton would specialise a call."""
    kernel, args, kwargs = launch
    options = {option: kwargs.pop(option) for option in ("num_warps", "num_stages", "maxnreg") if option in kwargs}
    if arch.dispatch == "hip":
        options.pop("maxnreg", None)  # ptxas's
    values = dict(zip(kernel.arg_names, args, strict=False), **kwargs)
    divisible = [["tt.divisibility", 16]]
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            if not is_ragged:
                attributes[(i,)] = divisible + ([["tt.pointer_range", 32]] if arch.dispatch == "hip" else [])
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize and not is_ragged:
                attributes[(i,)] = divisible
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=arch.target, options=options)


TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}


def launches(
    subject: Layer,
    dtype: torch.dtype,
    precision: str,
    tile: Tile,
    width: int,
    keeps: bool,
    recording: Recording | None = None,
) -> dict[str, Launch]:
    """The launches of a layer [4096, width] -> [4096, width], by kernel, caught on their way to a GPU."""
    caught: dict[str, Launch] = {}

    def make(_: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    operands, spec = subject.operands(4096, width, width, make), subject.spec
    with (
        mock.patch.object(layer, "_forward_kernel", _catch(caught, "forward", layer._forward_kernel)),
        mock.patch.object(layer_backward, "_dz_kernel", _catch(caught, "dz", layer_backward._dz_kernel)),
        mock.patch.object(layer_backward, "_dx_kernel", _catch(caught, "dx", layer_backward._dx_kernel)),
    ):
        y, z, s = layer.forward(operands, spec, dtype, tile, precision, True, spec.skip == "projection")
        z, s = (z, s) if keeps else (None, None)
        wanted = everything(operands)
        layer_backward.backward(y, operands, z, s, spec, wanted, Tiles(tile, tile, tile), precision, recording)
    return caught


def _faults(job: Job, finding: Finding) -> str:
    """Spills are none while recording: its tiles are those of the kernel that does not, so that bits are the same."""
    return (finding._replace(spilled=0) if job.load == RECORDED else finding).faults(job.arch)


def _recording() -> Recording:
    return Recording(torch.empty(1, device="meta"), lambda row, parts: None, 0)


def stack_launches(job: Job, dtype: torch.dtype, precision: str) -> dict[str, Launch]:
    """Those of a run of 8 layers [4096, d]; a heavy one's backward recomputes, where it has a choice."""
    caught: dict[str, Launch] = {}
    c = job.configuration
    assert isinstance(c, StackConfiguration)
    subject = (
        Stack(job.activation)
        if job.load in (PLAIN, RECORDED)
        else Stack(job.activation, "post", True, True, job.load == HEAVY)
    )

    def make(_: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, run, keep_every = make("x", 4096, c.d), subject.run(8, c.d, make), 3 if job.load == HEAVY else 1
    keep_every = keep_every if c.sums_weight else 1
    with (
        mock.patch.object(stack, "_forward_kernel", _catch(caught, "stack_forward", stack._forward_kernel)),
        mock.patch.object(
            stack_backward, "_backward_kernel", _catch(caught, "stack_backward", stack_backward._backward_kernel)
        ),
    ):
        y, kept = stack.forward(x, run, c.tile, precision, keep_every)
        tiles = StackTiles(c.tile, c.tile)
        given = (y, x, kept, run, subject.wanted(), tiles, precision, keep_every, 264, c.sums_weight)
        stack_backward.backward(*given, _recording() if job.load == RECORDED else None)
    return caught


def sum_launches(c: SumConfiguration, dtype: torch.dtype) -> dict[str, Launch]:
    """Those of a sum whose scales are all learned and that drops samples; its memory is c.view's."""
    caught: dict[str, Launch] = {}

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    memory, scale = c.view.stretches * c.view.length, make(c.view.channels) if c.per != "all" else make()
    terms = Terms(make(memory), make(memory), scale, make(), torch.tensor(2**62 + 2**31 + 1))
    spec = LayerSpec("none", skip="residual", drop_path=0.1)
    with (
        mock.patch.object(residual, "_forward_kernel", _catch(caught, "sum_forward", residual._forward_kernel)),
        mock.patch.object(residual, "_backward_kernel", _catch(caught, "sum_backward", residual._backward_kernel)),
    ):
        residual.forward(terms, spec, c.view, make(memory), c.tile)
        wanted = WantedTerms(True, True, True, True)
        residual.backward(make(memory), terms, spec, c.view, make(memory), make(memory), wanted, c.tile)
    return caught


def _catch(caught: dict[str, Launch], name: str, kernel: Any) -> Any:
    """In the kernel's place: what a launch gives it, under a name."""

    def grid(_: object) -> Callable[..., None]:
        return lambda *args, **kwargs: caught.update({name: (kernel, args, kwargs)})

    return mock.MagicMock(__getitem__=mock.Mock(side_effect=grid))


def _layer(job: Job) -> Layer:
    has_projection = job.configuration.has_projection
    if job.load in (PLAIN, RECORDED):
        return Layer(LayerSpec(job.activation, skip="projection" if has_projection else "identity"))
    spec = LayerSpec(job.activation, order="post", skip="projection" if has_projection else "residual", drop_path=0.1)
    if job.configuration.kernel == "dx" and not has_projection:  # where a residual is given, dx is a product alone
        spec = spec._replace(order="pre", skip="identity")
    return Layer(spec, is_learned=True, has_residual=spec.skip == "residual")


# ---------------------------------------------------------------------------------------------- reading


def _read_cubin(compiled: Any, log: str) -> Finding:
    """ptxas's own account of registers and spills, and the machine code's instructions."""
    stack, spilled = (int(n) for n in re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log).groups())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout
    # "/*0df0*/  @P0 HGMMA.64x64x16.F32.BF16 R56, gdesc[UR4].tnspB, R56 ;" or, A in registers, "R56, R88, gdesc[UR4] …"
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", sass, re.M)
    counts: dict[str, Any] = Counter()
    for instruction, arguments in code:
        stem = instruction.split(".")[0]
        counts["products"] += stem in ("HMMA", "HGMMA") or bool(re.fullmatch(r"UTC[A-Z]*MMA", stem))
        counts["from_registers"] += stem == "HGMMA" and bool(re.match(r"R\w+,\s*R\d", arguments))
        counts["bulk_copies"] += stem in ("UTMALDG", "UTMASTG", "UBLKCP")
        counts["async_copies"] += stem == "LDGSTS"
        counts["loads"] += stem == "LDG"
        counts["wide_loads"] += stem == "LDG" and ".128" in instruction
        counts["local_memory"] += stem in ("LDL", "STL")
    return Finding(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        threads=32 * compiled.metadata.num_warps,
        spilled=spilled,
        local=max(0, stack - spilled),
        shared=compiled.metadata.shared,
        serialized="wgmma.mma_async instructions are serialized" in log,
        **counts,
    )


def _read_amdgcn(compiled: Any, log: str) -> Finding:
    """The assembly's metadata and instructions. Scalar registers spill into vector ones, which costs no memory."""
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"^\s+\.{key}:\s+(\d+)", text, re.M)[1])

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+(?:{pattern})", text, re.M))

    scratch, spills = number("private_segment_fixed_size"), 4 * number("vgpr_spill_count")
    return Finding(
        registers=number("vgpr_count"),
        spilled=spills,
        local=max(0, scratch - spills),
        shared=compiled.metadata.shared,
        products=count("v_mfma"),
        async_copies=count(r"(?:buffer|global)_load\w* .*\blds\b"),
        loads=count("(?:buffer|global)_load"),
        wide_loads=count("(?:buffer|global)_load_dwordx4"),
        local_memory=count("scratch_"),
    )


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
}


def table(findings: dict[Job, Finding]) -> str:
    header = f"{'kernel':<15}{'mode':<5}{'tile':<17}{'layer':<11}{'widths':<8}{'load':<7}{'φ':<10}"
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


def _label(c: Configuration | StackConfiguration | SumConfiguration) -> str:
    if isinstance(c, SumConfiguration):
        tile, layer, widths = name(c.tile), f"a by {c.per}", str(c.length + c.is_ragged)
    elif isinstance(c, StackConfiguration):
        tile, layer, widths = name(c.tile), "", str(c.d)
        if c.kernel == "stack_backward":
            layer = "sums dw" if c.sums_weight else "writes dz"
    else:
        tile, layer = name(c.tile), "projection" if c.has_projection else "tensor"
        widths = "ragged" if c.is_ragged else "aligned"
    return f"{c.kernel:<15}{c.mode:<5}{tile:<17}{layer:<11}{widths:<8}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHES, help="default: all; with --quick, sm_90")
    every_kernel = KERNELS + STACK_KERNELS + SUM_KERNELS
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
            every = [c for c in shipped(ARCHES[arch].dispatch) if c.is_ragged in widths]
            chosen = [c for c in every if c.kernel in options.kernel and c.mode in options.mode]
            queue += jobs(arch, chosen, options.quick)
            stacks = [c for c in shipped_stacks(ARCHES[arch].dispatch) if c.is_ragged in widths]
            runs = [c for c in stacks if c.kernel in options.kernel and c.mode in options.mode]
            queue += stack_jobs(arch, runs, options.quick)
            sums = [c for c in shipped_sums() if c.is_ragged in widths and c.mode in options.mode]
            queue += [Job(arch, c, "none") for c in sums if c.kernel in options.kernel]

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
