"""First calls ahead of time: kernels compiled, the C++ engine built, before something is timed or captured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch


def warmup(
    module: nn.Module,
    shapes: Sequence[int] | Iterable[Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    backward: bool = True,
) -> None:
    """Calls the module with inputs of these shapes, forward and backward, on its own device, in its own mode.

    Afterwards calls of these shapes compile and build nothing, so that a CUDA graph may capture them. Gradients,
    buffers and random states stay as they were.

        warmup(model, x.shape, dtype=x.dtype)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            y = model(x)
        x.copy_(new_batch)
        graph.replay()                     # y is there, for the price of one launch

    Args:
        module: any, with a floating parameter or buffer.
        shapes: of inputs [..., K]; one, or several.
        dtype: of inputs; where not given, that of the module's first floating parameter.
        backward: whether to differentiate too, with respect to the input and to what requires a gradient.

    Raises:
        TypeError: module is no nn.Module, or without a floating parameter or buffer.
        ValueError: a shape is not one of integers.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    if like is None:
        raise TypeError(f"{type(module).__name__} has no floating parameter or buffer to take device and dtype from")
    given: list[Any] = list(shapes)
    listed = [given] if all(isinstance(size, int) for size in given) else given
    devices = [like.device] if like.device.type == "cuda" else []
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    stream = torch.cuda.Stream(like.device) if devices else None
    try:
        # what a graph is to capture wants its first calls on another stream than the default one
        with torch.random.fork_rng(devices), torch.cuda.stream(stream):
            for shape in listed:
                x = torch.zeros(_sizes(shape), dtype=dtype or like.dtype, device=like.device)
                with torch.inference_mode(False), torch.set_grad_enabled(backward), dispatch.warming():
                    _call(module, x.requires_grad_(backward))
        if devices:
            torch.cuda.synchronize(like.device)
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _call(module: nn.Module, x: Tensor) -> None:
    y = module(x)
    if y.requires_grad:
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
        torch.autograd.grad(y, inputs, torch.zeros_like(y), allow_unused=True)


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if not sizes or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"shapes must be shapes [..., K] of integers, got {shape!r}")
    return sizes
