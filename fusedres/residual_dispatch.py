"""What runs the sum that ends a residual block, with which tile: functions of plain facts, answers with reasons."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch
from .dispatch import Eager, Native, Triton
from .kernels.config import SumTile
from .kernels.spec import PER, LayerSpec, Terms, View

# Numbers, from which the C++ engine is worth its call on a CPU (`python bench/residual.py`): where it saves a pass over
# them; and where it saves nothing but fresh memory, which PyTorch would ask the system for.
LEAST, LEAST_OF_ONE_PASS = 1 << 20, 1 << 23


def choose(terms: Terms, spec: LayerSpec) -> Eager | Triton | Native:
    """The backend for y = a drop(branch) + λ x of these terms, here and now."""
    branch, x, branch_scale, skip_scale, _ = terms
    if dispatch.is_eager_forced():
        return Eager("fusedres.eager() is in force")
    if torch.jit.is_tracing():
        return Eager("torch.jit.trace records PyTorch's own operations, which run wherever TorchScript does")
    drops = spec.drop_path > 0
    if branch_scale is skip_scale is None and not drops and is_one_pass(terms, spec):
        return Eager("PyTorch's addition is one pass already, and there is no sum to take in backward")
    if dispatch.transforms_are_active() or getattr(forward_ad, "_current_level", -1) >= 0:
        return Eager("torch.func's transforms, and forward mode, go through PyTorch's own operations")
    choice = backend(branch, (branch.dtype, x.dtype), branch_scale)
    if isinstance(choice, Native) and not drops and type(branch.numel()) is int:  # a traced size is none
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in terms)
        least = LEAST_OF_ONE_PASS if is_one_pass(terms, spec) and not trains else LEAST
        if branch.numel() < least:
            return Eager(f"below {least} numbers a call costs more than the passes over memory that it saves")
    return choice


def is_one_pass(terms: Terms, spec: LayerSpec) -> bool:
    """Whether PyTorch has one operation for y: a single scale, which is not 1."""
    scaled = terms.branch_scale is not None or spec.branch_scale != 1.0
    return not (scaled and (terms.skip_scale is not None or spec.skip_scale != 1.0))


def backend(like: Tensor, dtypes: Sequence[torch.dtype], branch_scale: Tensor | None) -> Eager | Triton | Native:
    """What there is for a branch and an x of these dtypes, where and as `like` is, whatever the switches."""
    if like.dim() == 0 or like.numel() == 0:
        return Eager("there is no row for a kernel to take")
    dtype = output_dtype(dtypes, branch_scale)
    choice = _backend(like.device, dtype)
    if isinstance(choice, Native) and set(dtypes) != {dtype}:
        return Eager("the C++ engine computes in one dtype, and the terms, or a scale per channel, are of two")
    return choice


def _backend(device: torch.device, dtype: torch.dtype) -> Eager | Triton | Native:
    choice = dispatch.backend(device, dtype)
    if isinstance(choice, Eager) and device.type == "cpu" and dtype == torch.bfloat16:
        single = dispatch.backend(device, torch.float32)  # without products, bfloat16 needs no more than float32 does
        choice = single if isinstance(single, Native) else choice
    return Native("the C++ engine passes over memory once each way") if isinstance(choice, Native) else choice


def output_dtype(dtypes: Sequence[torch.dtype], branch_scale: Tensor | None) -> torch.dtype:
    """What the formula promotes to: a scale of one number changes nothing."""
    dtype = torch.promote_types(*dtypes)
    is_number = branch_scale is None or branch_scale.dim() == 0
    return dtype if is_number else torch.promote_types(dtype, branch_scale.dtype)


@lru_cache(maxsize=4096)
def tile(view: View, itemsize: int) -> SumTile:
    """16 bytes or more of an operand to a thread. Per column, tiles are high: they leave a row of partial sums each."""
    warps, size = 4, view.stretches * view.length
    numbers = 32 * warps * max(8, 16 // itemsize)
    if PER[view.per] == "column":
        rows = _power_of_two(size // view.channels)
        columns = min(_power_of_two(view.channels), max(64, numbers // rows))
    else:
        rows, columns = _power_of_two(view.stretches), min(numbers, _power_of_two(view.length))
    return SumTile(min(max(1, numbers // columns), rows), columns, warps)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
