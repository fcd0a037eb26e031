"""Launches that find their compiled kernel again without Triton's asking what it was compiled for.

Triton's own way there takes the host twice as long and more (`python bench/launch_cost.py`). What it asks is asked here
too, of what our kernels are given: matrices, descriptors, numbers, None. What Triton is switched to later, such as its
debug mode, does not reach kernels that are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

MOST = 4096  # launches that are known, before all are forgotten

_known: dict[tuple, tuple[CompiledKernel, tuple]] = {}


def cdiv(size: int, block: int) -> int:
    """How many blocks a size is cut into; triton.cdiv, which kernels may call too, takes microseconds."""
    return -(-size // block)


def launch(kernel: Any, programs: int, args: Sequence[Any], compiled_for: dict[str, Any]) -> Any:
    """kernel[(programs,)](*args, **compiled_for), the compiled kernel where there is one.

    args are the kernel's first parameters, in their order; the others, constants, are in `compiled_for`, always in the
    same order, together with options such as num_warps.
    """
    if type(kernel) is not JITFunction or torch.version.hip:  # the interpreter's; AMD's ask for more
        return kernel[(programs,)](*args, **compiled_for)
    device = driver.active.get_current_device()
    key = _key(kernel, device, args, compiled_for)
    found = _known.get(key)
    if found is None:
        built = kernel[(programs,)](*args, **compiled_for)
        if isinstance(built, CompiledKernel):
            if len(_known) >= MOST:
                _known.clear()
            _known[key] = built, tuple(compiled_for[name] for name in kernel.arg_names[len(args) :])
        return built
    built, constants = found
    built[programs, 1, 1](*args, *constants, stream=driver.active.get_current_stream(device))
    return built


def _key(kernel: JITFunction, device: int, args: Sequence[Any], compiled_for: dict[str, Any]) -> tuple:
    """All that decides which compiled kernel it is: of tensors dtype and alignment; of numbers whether they have 32
    bits and, where the kernel is specialised for it, whether they are 1 or divided by 16."""
    key: list[Any] = [id(kernel), device]
    for value, parameter in zip(args, kernel.params, strict=False):
        kind = type(value)
        if value is None:
            key.append(None)
        elif kind is int:
            if not parameter.do_not_specialize:
                key += (value == 1, value % 16 == 0)
            key.append(-(2**31) <= value < 2**31)
        elif kind is float:
            key.append(float)
        elif kind is TensorDescriptor:
            key += (kind, value.base.dtype, *value.block_shape)
        else:
            key += (value.dtype, value.data_ptr() % 16 == 0)
    key += compiled_for.values()
    return tuple(key)
