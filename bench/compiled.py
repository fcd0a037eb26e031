"""A kernel compiled for a GPU that is not there, from a launch caught on its way, and what the compiler made of it."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # triton reads it as it defines kernels; interpreted ones do not compile
os.environ["TRITON_DUMP_PTXAS_LOG"] = os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a kernel out of a cache has no log

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

Launch = tuple[Any, tuple, dict[str, Any]]  # kernel, arguments, keyword arguments
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}


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
NVIDIA_REGISTERS = 64 * 1024  # of a multiprocessor, all of which one program can have
RESERVED = 1024  # bytes of shared memory that each program costs beside its own
NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"


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
    instructions: int = 0
    error: str = ""

    def faults(self, arch: str, residents: int = 1) -> str:
        """residents: programs that a multiprocessor is to have at a time, by which they share what it has."""
        limit = (ARCHES[arch].shared + RESERVED) // residents - RESERVED
        taken = residents * self.threads * -(-self.registers // 8) * 8
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


def catch(found: dict[str, Launch], name: str, kernel: Any) -> Any:
    """In the kernel's place: what a launch gives it, under a name."""

    def grid(_: object) -> Callable[..., None]:
        return lambda *args, **kwargs: found.update({name: (kernel, args, kwargs)})

    return mock.MagicMock(__getitem__=mock.Mock(side_effect=grid))


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
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
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


def read(built: Any, log: str) -> Finding:
    """Of a compiled kernel, and of what its compiler printed."""
    return (_read_amdgcn if "amdgcn" in built.asm else _read_cubin)(built, log)


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
        counts["instructions"] += 1
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
        instructions=count(r"[a-z]\w+[ \n]"),
    )
