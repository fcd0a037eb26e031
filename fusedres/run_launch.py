"""One launch of a run of layers, forward or backward, in Triton: layers [d, d] of one kind, their tensors stacked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .kernels.config import StackTiles
from .kernels.record import Recording
from .kernels.spec import NetworkSpec, Run, Wanted


def tiles(x: Tensor, spec: NetworkSpec) -> StackTiles | None:
    """The tiles of a run that is called with x [..., d]; None where it goes layer by layer."""
    choice = dispatch.backend(x.device, x.dtype)
    if not isinstance(choice, dispatch.Triton):
        return None
    width = spec.widths[0]
    is_skinny = x.numel() // width <= dispatch.SKINNY and not dispatch.is_batch_invariant()
    precision, trusts = dispatch.precision(x.dtype), choice.trusts_registers
    return dispatch.stack_tiles(width, x.dtype, precision, choice.generation, is_skinny, trusts)


def has_tiles(device_type: str, index: int | None, dtype: torch.dtype, width: int) -> bool:
    """Whether runs of this width go by a run's kernels here."""
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    choice = dispatch.backend(device, dtype)
    if not isinstance(choice, dispatch.Triton):
        return False
    return dispatch.stack_tiles(width, dtype, dispatch.precision(dtype), choice.generation, False) is not None


has_tiles.__dict__["_dynamo_marked_constant"] = True  # torch.compile is to call it, not to trace it


def forward(
    spec: NetworkSpec, tensors: Sequence[Tensor], x: Tensor, seeds: Tensor | None, keep_every: int | None
) -> tuple[Tensor, Tensor | None]:
    """y [..., d], and the rows between layers that are kept for backward, every so many layers."""
    from .kernels.triton import stack

    _refuse_capture(x, seeds)
    x = x.resolve_neg()
    with torch.cuda.device_of(x):
        run = _described(spec, tensors, seeds, x.device)
        rows = x.reshape(-1, x.shape[-1])
        y, kept = stack.forward(rows, run, tiles(x, spec).forward, dispatch.precision(x.dtype), keep_every)
    return y.view(x.shape), kept


def backward(
    g: Tensor,
    spec: NetworkSpec,
    tensors: Sequence[Tensor],
    x: Tensor,
    kept: Tensor,
    seeds: Tensor | None,
    keep_every: int,
    wanted: Sequence[bool],
    recording: Recording | None = None,
) -> list[Tensor | None]:
    """The gradients of x and of the tensors, None where not wanted."""
    from .kernels.triton import stack_backward

    slots, width = spec.layers[0].slots, spec.widths[0]
    wishes = {name: slot >= 0 and wanted[1 + slot] for name, slot in slots._asdict().items()}
    x, g = x.resolve_neg(), g.resolve_neg()
    with torch.cuda.device_of(x):
        run, chosen = _described(spec, tensors, seeds, x.device), tiles(x, spec)
        rows, L = x.reshape(-1, width), len(spec.layers)
        processors = dispatch.multiprocessors(x.device)
        sums_weight = dispatch.stack_sums_weight(L, width, processors)
        found = stack_backward.backward(
            g.reshape(-1, width),
            rows,
            kept,
            run,
            Wanted(x=wanted[0], residual=False, **wishes),
            chosen,
            dispatch.precision(x.dtype),
            keep_every,
            dispatch.stack_programs(len(rows), L, width, chosen.backward, sums_weight, processors),
            sums_weight,
            recording,
        )
    gradients: list[Tensor | None] = [None if found.x is None else found.x.view(x.shape), *[None] * len(tensors)]
    for name, slot in slots._asdict().items():
        gradient = getattr(found, name)
        if gradient is not None:
            gradients[1 + slot] = gradient.reshape(tensors[slot].shape)
    return gradients


def _described(spec: NetworkSpec, tensors: Sequence[Tensor], seeds: Tensor | None, device: torch.device) -> Run:
    """What the kernels take of a run; seeds [L] on the CPU, None where no row drops."""
    slots, first, width = spec.layers[0].slots, spec.layers[0].spec, spec.widths[0]

    def of(name: str) -> Tensor | None:
        slot = getattr(slots, name)
        if slot < 0:
            return None
        stack = tensors[slot].resolve_neg()
        is_flat = stack.dim() == 1 and (name == "bias" or stack.numel() > len(spec.layers))
        return stack.view(-1, width) if is_flat else stack

    lam, a = of("skip_scale"), of("branch_scale")
    return Run(
        weight=of("weight"),
        bias=of("bias"),
        skip_scale=_number(spec, "skip_scale", device) if lam is None else lam,
        branch_scale=_number(spec, "branch_scale", device) if a is None else a,
        seeds=None if seeds is None else seeds.to(device, non_blocking=True),
        threshold=0 if seeds is None else _number(spec, "drop_threshold", device),
        keep_scale=1.0 if seeds is None else _number(spec, "keep_scale", device),
        activation=first.activation,
        order=first.order,
        has_skip=first.skip == "identity",
    )


@lru_cache(maxsize=256)
def _number(spec: NetworkSpec, name: str, device: torch.device) -> Any:
    """The number that all layers of a run have, or each one's, where kernels read them."""
    values = [getattr(layer.spec, name) for layer in spec.layers]
    if len(set(values)) == 1:
        return values[0]
    return torch.tensor(values, device=device, dtype=torch.int64 if name == "drop_threshold" else torch.float32)


def _refuse_capture(x: Tensor, seeds: Tensor | None) -> None:
    """Raises RuntimeError where a CUDA graph would record the seeds, hence drop the same rows at every replay."""
    if seeds is not None and x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("drop_path cannot be captured in a CUDA graph: every replay would drop the same rows")
