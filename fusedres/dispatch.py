"""Which backend runs a call, with which tiles or in which way: functions of plain facts, answers with reasons.

On a GPU nothing depends on the number of rows but a coarse class (at most SKINNY rows, or more; for runs of wide layers
at most STACK_FEW_ROWS, or more), so that a row's bits do not depend on the batch around it within a class, and no new
batch size within it compiles anything. On a CPU the way does.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec

import torch

from . import assembler, native
from .kernels.config import StackTile, StackTiles
from .kernels.spec import WAYS, LayerSpec, Operands

SKINNY = 64  # rows, up to which a layer reads its weights rather than its rows

# The ways of the CPU engine, by widths and rows.
LANES_BELOW = 16  # every width below it: a row fills no SIMD register, so that rows are the lanes, however few
DOTS_UP_TO = 4  # rows, up to which a product is dot products with the weights as they lie,
WIDE_DOTS_UP_TO = 8  # and where weights are too many to be packed for so few rows
BLOCKS_UP_TO = 128  # every width up to it: the activations of a block of rows stay in L1 and L2 through all layers
SHALLOW = 4  # layers, up to which rows of whole vectors are quicker as they lie than turned to lanes and back
SINGLE_LANES_UP_TO = 64  # width of one layer, up to which its rows are worth turning where they end within a vector
PAIRED_LANES_BELOW = 32  # widths of bfloat16, from which brgemm's pairs are quicker than lanes, which have none

# Bytes that a network keeps for backward before it computes them again instead, with recompute="auto": what stays in a
# shared cache. Products of widths from 48 on cost more than reading a gibibyte; layer by layer all is kept.
KEPT_UP_TO = 12 << 20
WIDE_KEPT_UP_TO, WIDE_FROM = 1 << 30, 48

# Private to torch, they tell how a call arrived. A torch without one gets the answer that is right for every call.
transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
modes_in_force = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
is_any_autocast_enabled = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)  # 0.5 µs less than of one device
is_legacy_batch = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)

# Of sizes that checks read while torch.jit.trace records: parameters fix them. torch does the same for its own modules.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"fusedres\.")


@dataclass(frozen=True)
class Eager:
    """The reference formula in PyTorch's own operations."""

    because: str


@dataclass(frozen=True)
class Triton:
    """The fused kernels, compiled for a GPU or run by Triton's interpreter."""

    because: str
    target: str  # cuda, hip, or interpreter
    capability: int = 0  # of a cuda device: 80, 90, …
    gpu: str = ""
    trusts_registers: bool = True  # products may read an operand from registers (`assembler.py`)

    @cached_property
    def generation(self) -> str:
        return generation_of(self.target, self.capability)


def generation_of(target: str, capability: int) -> str:
    """Which tiles are a chip's: hip, interpreter, or of NVIDIA's, interpreted ones too: ampere, hopper, blackwell.

    ampere is whatever gives a program 99 KiB of shared memory and multiplies warp by warp: 8.x, and 12.x too.
    """
    if target == "hip" or capability == 0:
        return target
    if 90 <= capability < 100:
        return "hopper"
    return "blackwell" if 100 <= capability < 120 else "ampere"


@dataclass(frozen=True)
class Native:
    """The C++ engine on the CPU."""

    because: str


@dataclass(frozen=True)
class Way:
    """How the C++ engine cuts a call's work: its index and name in `kernels.spec.WAYS`."""

    index: int
    name: str
    because: str


class _Switches:
    """How many blocks, of all threads, are in force."""

    force_eager = 0
    batch_invariant = 0
    warming = 0
    has_warmed = False  # ever


def choose(device: torch.device, dtype: torch.dtype, is_empty: bool) -> Eager | Triton | Native:
    """The backend for operands on this device, computing in this dtype."""
    if _Switches.force_eager:
        return Eager("fusedres.eager() is in force")
    if is_empty:
        return Eager("an empty tensor leaves a kernel nothing to do")
    if torch.jit.is_tracing():
        return Eager("torch.jit.trace records PyTorch's own operations, which run wherever TorchScript does")
    if transforms_are_active():
        if torch.compiler.is_compiling():
            return Eager("torch.compile traces torch.func's transforms through PyTorch's own operations")
        if _is_inside_vmap():
            return Eager("torch.vmap may batch any operand, and the kernels take a batch of rows alone")
    return backend(device, dtype)


def backend(device: torch.device, dtype: torch.dtype) -> Eager | Triton | Native:
    """What this device has for this dtype, whatever switches and transforms are in force."""
    if torch.compiler.is_compiling():
        return _traced_backend(device.type, device.index, dtype)
    return _cached_backend(device, dtype)


@lru_cache(maxsize=256)
def _cached_backend(device: torch.device, dtype: torch.dtype) -> Eager | Triton | Native:
    return _constant_backend(device.type, device.index, dtype)


def _is_inside_vmap() -> bool:
    try:
        from torch._C._functorch import TransformType, get_interpreter_stack
    except ImportError:
        return True
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ())


def _constant_backend(device_type: str, index: int | None, dtype: torch.dtype) -> Eager | Triton | Native:
    return _backend(device_type, index, dtype, os.environ.get("TRITON_INTERPRET") == "1")


def _traced_backend(device_type: str, index: int | None, dtype: torch.dtype) -> Eager | Triton | Native:
    if torch.onnx.is_in_onnx_export():
        return Eager("ONNX has PyTorch's own operations, and no fused layer")
    return _constant_backend(device_type, index, dtype)


# torch.compile is to call it, not to trace it, and finds the mark on a plain function only, not on a cached one.
# torch.compiler.assume_constant_result sets it too, but imports torch._dynamo, and so triton, for a second.
_traced_backend.__dict__["_dynamo_marked_constant"] = True


@lru_cache(maxsize=256)
def _backend(device_type: str, index: int | None, dtype: torch.dtype, is_interpreted: bool) -> Eager | Triton | Native:
    if device_type not in ("cuda", "cpu"):
        return Eager(f"there are no kernels for {device_type} devices")
    if device_type == "cpu" and not is_interpreted:
        return _cpu_backend(dtype)
    if find_spec("triton") is None:
        return Eager("triton is not installed")
    if dtype == torch.float64:
        return Eager("the kernels accumulate in float32, which is less than torch.float64 asks for")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Eager(f"there are no kernels for {dtype}")
    if is_interpreted:
        if dtype == torch.bfloat16:
            return Eager("Triton's interpreter computes bfloat16 products wrongly")
        return Triton("TRITON_INTERPRET=1: the kernels run in Triton's interpreter", "interpreter")
    gpu = torch.cuda.get_device_name(index)
    if torch.version.hip:
        return Triton(f"{gpu} runs the kernels", "hip", gpu=gpu)
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return Eager(f"the kernels need compute capability 8.0, this GPU has {major}.{minor}")
    capability = 10 * major + minor
    trusts = assembler.trusts_register_operands(gpu, capability)
    return Triton(f"{gpu} runs the kernels", "cuda", capability, gpu, trusts)


def _cpu_backend(dtype: torch.dtype) -> Eager | Native:
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return Eager(f"the CPU engine has no kernels for {dtype}")
    if reason := native.missing():
        return Eager(reason)
    if dtype == torch.bfloat16 and not has_brgemm(dtype):
        return Eager("torch's brgemm does not multiply bfloat16 on this processor, and nothing here does it faster")
    products = "torch's brgemm" if has_brgemm(dtype) else "its own loops"
    return Native(f"the C++ engine runs on the CPU, with products by {products}")


def has_brgemm(dtype: torch.dtype) -> bool:
    """Whether the CPU engine multiplies this dtype with oneDNN's brgemm, from torch itself."""
    from .kernels.cpu import launch

    bit = {torch.float32: 1, torch.bfloat16: 2}.get(dtype, 0)
    with ThreadPoolExecutor(1) as thread:  # where no tracer looks on, which would take the question into its program
        return bool(thread.submit(launch.capabilities).result() & bit)


def layer_way(operands: Operands, spec: LayerSpec, dtype: torch.dtype) -> Way | Eager:
    """The CPU engine's way for a layer x [..., K] -> [..., N] computing in dtype."""
    N, K = operands.weight.shape
    return cpu_way(rows(operands.x, K, spec.batch_invariant), (K, N), dtype)


def rows(x: torch.Tensor, K: int, is_batch_invariant: bool) -> int:
    """M of x [..., K], or, where a row's bits may not depend on it, one M for all."""
    return 1 << 16 if is_batch_invariant else x.numel() // K


@lru_cache(maxsize=4096)
def cpu_way(M: int, widths: tuple[int, ...], dtype: torch.dtype) -> Way | Eager:
    """The CPU engine's way for M rows through layers of these widths d₀, …, d_L, or that it has none worth taking."""
    widest = max(widths)
    if widest < LANES_BELOW:
        return _way("lanes", f"every width is below {LANES_BELOW}")
    most = DOTS_UP_TO if widest < BLOCKS_UP_TO else WIDE_DOTS_UP_TO
    if most >= M:
        return _way("dots", f"there are at most {most} rows")
    if widest > BLOCKS_UP_TO:
        return _way("layers", f"a width is above {BLOCKS_UP_TO}")
    if reason := _against_lanes(widths, dtype):
        return _way("blocks", f"no width is above {BLOCKS_UP_TO}, and {reason}")
    return _way("lanes", f"no width is above {BLOCKS_UP_TO}")


def _against_lanes(widths: tuple[int, ...], dtype: torch.dtype) -> str:
    """Why blocks of rows are not to go through layers up to BLOCKS_UP_TO as lanes; empty where they are."""
    widest, depth = max(widths), len(widths) - 1
    if dtype == torch.bfloat16 and (widest >= PAIRED_LANES_BELOW or depth == 1):
        return "bfloat16 multiplies in pairs"
    if dtype == torch.float32 and depth <= SHALLOW and all(width % 16 == 0 for width in widths):
        return f"up to {SHALLOW} layers of whole vectors are quicker as they lie"
    if dtype == torch.float32 and depth == 1 and widest > SINGLE_LANES_UP_TO:
        return f"one layer above {SINGLE_LANES_UP_TO} is quicker as it lies"
    return ""


def _way(name: str, because: str) -> Way:
    return Way(WAYS.index(name), name, because)


@lru_cache(maxsize=4096)
def keeps(M: int, widths: tuple[int, ...], dtype: torch.dtype, way: str) -> bool:
    """Whether a network that may choose keeps its activations for backward; if not, backward computes them again."""
    kept = M * sum(widths) * 2 * dtype.itemsize
    is_wide = sum(widths) >= WIDE_FROM * len(widths)
    return way == "layers" or kept <= (WIDE_KEPT_UP_TO if is_wide else KEPT_UP_TO)


def precision(dtype: torch.dtype) -> str:
    """How fp32 products multiply: ieee, or tf32 where torch's settings, old or new, allow it on this kind of GPU."""
    if dtype != torch.float32 or torch.version.hip:  # Triton knows tf32 on one AMD chip alone
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# Of runs of layers, (kind of product, width padded to a power of two) -> forward, backward: a stated heuristic, as
# `plans.py` has of layers. Exact fp32 goes few rows at a time. The widest read what they multiply from memory: a whole
# layer's weights would spill.
_STACKS = {
    ("half", 16): StackTiles(StackTile(128, 4, 3), StackTile(128, 8, 2)),
    ("half", 32): StackTiles(StackTile(128, 4, 3), StackTile(128, 8, 2)),
    ("half", 64): StackTiles(StackTile(128, 8, 3), StackTile(64, 8, 2)),
    ("half", 128): StackTiles(StackTile(64, 8, 3), StackTile(32, 8, 2)),
    ("tf32", 16): StackTiles(StackTile(128, 8, 3), StackTile(64, 8, 2)),
    ("tf32", 32): StackTiles(StackTile(128, 8, 3), StackTile(64, 8, 2)),
    ("tf32", 64): StackTiles(StackTile(64, 8, 3), StackTile(32, 8, 2)),
    ("tf32", 128): StackTiles(StackTile(32, 8, 2), StackTile(32, 8, 3, 32)),
    ("exact", 16): StackTiles(StackTile(32, 8, 2), StackTile(32, 4, 1)),
    ("exact", 32): StackTiles(StackTile(32, 8, 2), StackTile(16, 8, 2)),
    ("exact", 64): StackTiles(StackTile(32, 8, 2), StackTile(16, 8, 1)),
    ("exact", 128): StackTiles(StackTile(32, 8, 3, 32), StackTile(16, 8, 4, 16)),
    ("half", 256): StackTiles(StackTile(64, 8, 3, 32), StackTile(16, 8, 3, 64)),
    ("tf32", 256): StackTiles(StackTile(32, 8, 3, 32), StackTile(16, 8, 3, 16)),
    ("exact", 256): StackTiles(StackTile(16, 8, 1, 16), StackTile(16, 8, 1, 16)),
}
_BLACKWELL_STACKS = {  # where those would spill there
    ("exact", 128): StackTiles(StackTile(32, 8, 3, 32), StackTile(16, 8, 1, 16)),
    ("half", 256): StackTiles(StackTile(32, 8, 3, 32), StackTile(16, 8, 3, 64)),
}
# Every tile of rows reads all weights, so that of many rows wider layers than this have less to read one by one: 2 M d
# numbers forward, against M / 64 × d². (Exact fp32 takes fewer rows at a time, but multiplies for longer.)
STACK_ANY_ROWS_UP_TO, STACK_FEW_ROWS = 128, 4096
# A run's backward sums dw itself where its partial sums move less than dz through memory to a product over rows would
# (`python bench/stack_bytes.py`): in narrow layers, up to so many bytes of them.
STACK_SUMS_UP_TO, STACK_SUMS_BYTES = 32, 256 << 20
STACK_KEPT_UP_TO = 1 << 30  # bytes of rows between layers that are kept for backward, with recompute="auto"


def stack_tiles(
    d: int, dtype: torch.dtype, precision: str, generation: str, is_skinny: bool, trusts_registers: bool = True
) -> StackTiles | None:
    """The tiles of a run of layers of width d, or None where it goes layer by layer."""
    kind = "half" if dtype.itemsize == 2 else "tf32" if precision == "tf32" else "exact"
    width = max(16, 1 << (d - 1).bit_length())
    if (kind, width) not in _STACKS:
        return None
    if generation == "hip" and width * dtype.itemsize > 128:  # whose weights spill there
        tile = StackTile(16, 8, 1, 64 // dtype.itemsize)
        return StackTiles(tile, tile)
    # a width that is no multiple of 16 loads element by element, with an address each
    is_ragged = d % 16 > 0
    has_room = not (is_ragged and kind == "exact") and generation != "hip"

    most = 128 if trusts_registers else 32  # rows, up to which Hopper multiplies as older chips do

    def fitted(tile: StackTile, share: int) -> StackTile:
        rows = 16 if is_skinny else max(16, min(most, tile.BLOCK_M) // share)
        return tile._replace(BLOCK_M=rows, stages=tile.stages if has_room else 1)

    fewer = 2 if is_ragged and width == 128 else 1
    own = _BLACKWELL_STACKS.get((kind, width)) if generation == "blackwell" else None
    forward, backward = own or _STACKS[kind, width]
    return StackTiles(fitted(forward, fewer), fitted(backward, 4 if generation == "hip" else fewer))


def stack_pays(rows: int, d: int) -> bool:
    """Whether a run of width d that has tiles is to be one: wide ones, for few rows, unless all batches share bits."""
    return d <= STACK_ANY_ROWS_UP_TO or (not is_batch_invariant() and rows <= STACK_FEW_ROWS)


def stack_keeps(L: int, M: int, d: int, dtype: torch.dtype, recompute: bool | str) -> int:
    """Every how many layers a run keeps its rows for backward: 1, or what leaves the least in memory at a time."""
    if recompute is False or (recompute == "auto" and (L - 1) * M * d * dtype.itemsize <= STACK_KEPT_UP_TO):
        return 1
    return math.isqrt(L - 1) + 1  # ⌈√L⌉


def stack_sums_weight(L: int, d: int, multiprocessors: int) -> bool:
    """Whether a run's backward sums dw itself, with partial sums for two programs on every multiprocessor."""
    partial = 2 * multiprocessors * L * d * d * 4
    return d <= STACK_SUMS_UP_TO and partial <= STACK_SUMS_BYTES


def stack_programs(M: int, L: int, d: int, tile: StackTile, sums_weight: bool, multiprocessors: int) -> int:
    """How many programs share a run's backward: two to a multiprocessor, as far as their partial sums go."""
    partial = L * 4 * d * (d + 3 if sums_weight else 3)
    return max(1, min(-(-M // tile.BLOCK_M), 2 * multiprocessors, STACK_SUMS_BYTES // partial))


def is_switched() -> bool:
    """Whether a block below is in force."""
    return _Switches.force_eager > 0 or _Switches.batch_invariant > 0


@contextmanager
def eager() -> Iterator[None]:
    """Within it every call, of any thread, takes the reference formula, in PyTorch's own operations."""
    with _switched("force_eager"):
        yield


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Within it a row's bits do not depend on the batch around it, at any batch size: one tile class for all.

    Holds for the fused kernels; eager PyTorch makes no such promise.
    """
    with _switched("batch_invariant"):
        yield


@contextmanager
def warming() -> Iterator[None]:
    """Within it layers run by their kernels even where eager PyTorch is quicker: a graph that is captured has them."""
    _Switches.has_warmed = True
    with _switched("warming"):
        yield


def prefers_kernels(device: torch.device) -> bool:
    """While warming up, and in the captures of a process that has: what the host takes does not count there."""
    is_capturing = _Switches.has_warmed and device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return _Switches.warming > 0 or is_capturing


def is_eager_forced() -> bool:
    return _Switches.force_eager > 0


def is_batch_invariant() -> bool:
    return _Switches.batch_invariant > 0


@contextmanager
def _switched(name: str) -> Iterator[None]:
    setattr(_Switches, name, getattr(_Switches, name) + 1)
    try:
        yield
    finally:
        setattr(_Switches, name, getattr(_Switches, name) - 1)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU, which runs as many programs at a time and more; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
