"""One launch of a residual sum's kernels, forward or backward: terms laid alike in memory, and how that is seen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import residual_dispatch
from .dispatch import Native
from .kernels.cpu import launch as cpu
from .kernels.spec import PER, LayerSpec, Terms, View, WantedTerms


def strides(like: Tensor, drops: bool) -> tuple[int, ...]:
    """Of y, for a branch like this: its own where it is dense, in any order; samples that drop lie one by one."""
    if like.is_contiguous():
        return _contiguous(like.shape)
    found = torch.empty_like(like, device="meta").stride()
    is_by_sample = not drops or like.shape[0] == 1 or found[0] * like.shape[0] == like.numel()
    return found if is_by_sample else _contiguous(like.shape)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    found, step = [], 1
    for size in reversed(shape):
        found.append(step)
        step *= max(size, 1)
    return tuple(reversed(found))


def alike(tensor: Tensor, layout: tuple[int, ...]) -> Tensor:
    """The tensor with this layout: itself where it has it, else a copy."""
    tensor = tensor.resolve_neg()
    if tensor.stride() == layout:
        return tensor
    return torch.empty_strided(tensor.shape, layout, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def forward(terms: Terms, spec: LayerSpec, choice: Any) -> Tensor:
    """y [...], by the backend chosen, laid out as `strides` says."""
    drops = spec.drop_path > 0
    layout = strides(terms.branch, drops)
    terms = terms._replace(branch=alike(terms.branch, layout), x=alike(terms.x, layout))
    seen = view(terms.x.shape, layout, _scale_shape(terms.branch_scale), drops)
    if isinstance(choice, Native):
        return cpu.residual_forward(terms, spec, seen)
    from .kernels.triton import residual

    terms = Terms(*(None if t is None else t.resolve_neg() for t in terms))
    x = terms.x
    _refuse_capture(x, drops)
    dtype = residual_dispatch.output_dtype((terms.branch.dtype, x.dtype), terms.branch_scale)
    y = torch.empty_strided(x.shape, layout, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        residual.forward(terms, spec, seen, y, residual_dispatch.tile(seen, dtype.itemsize))
    return y


def backward(
    g: Tensor,
    terms: Sequence[Tensor | None],
    spec: LayerSpec,
    dtypes: Sequence[torch.dtype],
    wanted: WantedTerms,
    choice: Any,
) -> list[Tensor]:
    """The wanted gradients alone. Of `Terms`, branch and x, of these dtypes, are there where backward reads them."""
    branch, x, branch_scale, skip_scale, seed = terms
    drops = spec.drop_path > 0
    layout = strides(next(t for t in (branch, x, g) if t is not None), drops)
    g, branch, x = (None if t is None else alike(t, layout) for t in (g, branch, x))
    seen = view(g.shape, layout, _scale_shape(branch_scale), drops)
    terms = branch, x, *(None if t is None else t.resolve_neg() for t in (branch_scale, skip_scale)), seed
    if isinstance(choice, Native):
        return cpu.residual_backward(g, terms, spec, seen, wanted)
    from .kernels.triton import residual

    _refuse_capture(g, drops)
    db, dx = (
        torch.empty_strided(g.shape, layout, dtype=dtype, device=g.device) if is_wanted else None
        for dtype, is_wanted in zip(dtypes, wanted[:2], strict=True)
    )
    with torch.cuda.device_of(g):
        sums = residual.backward(g, terms, spec, seen, db, dx, wanted, residual_dispatch.tile(seen, g.dtype.itemsize))
    return [t for t in (db, dx, *sums) if t is not None]


@lru_cache(maxsize=4096)
def view(shape: tuple[int, ...], layout: tuple[int, ...], scale: tuple[int, ...], drops: bool) -> View:
    """The memory of dense tensors of this shape and these strides, as kernels see it; scale: a's, [] or [C, 1, …]."""
    numbers, channels = prod(shape), prod(scale)
    samples = shape[0] if drops else 1
    if channels == 1:
        return View(samples, numbers // samples, samples, 1, PER.index("all"))
    axis = len(shape) - len(scale)
    inner = layout[axis]
    if inner == 1 and not (drops and axis == 0):
        return View(samples, numbers // samples, samples, channels, PER.index("column"))
    return View(numbers // inner, inner, samples, channels, PER.index("stretch"))


def _scale_shape(branch_scale: Tensor | None) -> tuple[int, ...]:
    return () if branch_scale is None else tuple(branch_scale.shape)


def _refuse_capture(x: Tensor, drops: bool) -> None:
    """As for a layer: a CUDA graph would record one seed, hence drop the same samples at every replay."""
    if drops and x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("drop_path cannot be captured in a CUDA graph: every replay would drop the same rows")
