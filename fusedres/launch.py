"""One launch of a layer's kernels, forward or backward, with what dispatch chose: tiles for Triton, a way for C++."""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import dispatch, plans, recording
from .dispatch import Eager, Native, Triton, Way
from .kernels.config import Elementwise, PersistentTile, Tile, Together
from .kernels.cpu import launch as cpu
from .kernels.spec import WAYS, Gradients, LayerSpec, Operands, Wanted

ANY_WAY = WAYS.index("layers")  # where eager would be quicker, and an operator that is called has no choice


def forward(operands: Operands, spec: LayerSpec, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [..., C], and for backward, where keep: φ' or z, and s, [M, N] each, from Triton; bytes and None from C++."""
    choice = dispatch.backend(operands.x.device, operands.x.dtype)
    if isinstance(choice, Native):
        return _cpu_forward(operands, spec, keep)
    if isinstance(choice, Eager):
        _refuse(operands, choice)
    operands = _resolved(operands)
    x = operands.x
    _refuse_capture(operands, spec)
    keeps, keeps_skip = _keeps(operands, spec, keep, choice)
    plan = plans.layer_plan(operands, spec, choice, x.dtype)
    with torch.cuda.device_of(x):
        form = plan.training if keep else plan.forward
        y, memory, s = _triton_forward(_as_matrices(operands), spec, form, output_dtype(operands), keeps, keeps_skip)
    # in place, since autograd forbids changing a Function's output in place where it is a view
    return y.resize_(*x.shape[:-1], y.shape[1]), memory, s


def _triton_forward(
    operands: Operands,
    spec: LayerSpec,
    form: Tile | PersistentTile | Elementwise,
    dtype: torch.dtype,
    keeps: bool,
    keeps_skip: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    kernels = _kernels()
    how = dispatch.precision(operands.x.dtype)
    if isinstance(form, Elementwise):
        return kernels.layer_library.forward(operands, spec, dtype, form, keeps, keeps_skip)
    if isinstance(form, PersistentTile):
        programs = dispatch.multiprocessors(operands.x.device)
        return *kernels.layer_persistent.forward(operands, spec, dtype, form, how, keeps, programs), None
    return kernels.layer.forward(operands, spec, dtype, form, how, keeps, keeps_skip)


@cache
def _kernels() -> Any:
    """Imported by the first call that a GPU runs; an import statement within each would take a microsecond."""
    from .kernels import triton
    from .kernels.triton import layer, layer_backward, layer_library, layer_narrow, layer_persistent  # noqa: F401

    return triton


def backward(
    g: Tensor, operands: Operands, memory: Tensor | None, s: Tensor | None, spec: LayerSpec, wanted: Wanted
) -> Gradients:
    """The wanted gradients; memory and s are what forward kept, None where it kept nothing."""
    choice = dispatch.backend(operands.x.device, operands.x.dtype)
    if isinstance(choice, Native):
        return _cpu_backward(g, operands, memory, spec, wanted)
    if isinstance(choice, Eager):
        _refuse(operands, choice)
    operands = _resolved(operands)
    x, residual = operands.x, operands.residual
    _refuse_capture(operands, spec)
    plan = plans.layer_plan(operands, spec, choice, x.dtype, g)
    how, programs = dispatch.precision(x.dtype), dispatch.multiprocessors(x.device)
    watched = recording.of(spec.watch) if spec.watch else None
    g, matrices = g.resolve_neg().reshape(-1, g.shape[-1]), _as_matrices(operands)
    with torch.cuda.device_of(x):
        if isinstance(plan.backward, Together):
            gradients = _kernels().layer_narrow.backward(
                g, matrices, spec, wanted, plan.backward.rows, 2 * programs, how, watched
            )
        else:
            gradients = _kernels().layer_backward.backward(
                g, matrices, memory, s, spec, wanted, plan.backward, plan.weight, how, programs, watched
            )
    return gradients._replace(
        x=None if gradients.x is None else gradients.x.reshape(x.shape),
        residual=None if gradients.residual is None else gradients.residual.reshape(residual.shape),
    )


def kept(operands: Operands, spec: LayerSpec, keep: bool) -> tuple[torch.dtype | None, bool]:
    """The dtype of what the operator's forward keeps [M, N], None for nothing; whether it keeps a projected skip."""
    # How many bytes C++ keeps, a fake cannot know: the operator keeps none there, and backward computes them again.
    choice = dispatch.backend(operands.x.device, operands.x.dtype)
    if not isinstance(choice, Triton):
        return None, False
    keeps, keeps_skip = _keeps(operands, spec, keep, choice)
    return operands.kept_dtype if keeps else None, keeps_skip


def _keeps(operands: Operands, spec: LayerSpec, keep: bool, choice: Triton) -> tuple[bool, bool]:
    """Whether Triton's forward writes φ' or z, and a projected skip: where backward reads them and the caller keeps."""
    keep = keep and not spec.recompute and not plans.keeps_input_alone(operands, spec, choice)
    learns = operands.branch_scale is not None
    is_skip_read = operands.skip_scale is not None or (spec.activates_sum and learns)
    return keep and (spec.activation != "none" or learns), keep and spec.skip == "projection" and is_skip_read


def output_dtype(operands: Operands) -> torch.dtype:
    """What eager's sum promotes to: autocast alone makes the skip, or a branch scale per channel, differ from x."""
    dtype = operands.x.dtype
    if operands.residual is not None:
        dtype = torch.promote_types(dtype, operands.residual.dtype)
    if operands.branch_scale is not None and operands.branch_scale.dim() > 0:
        dtype = torch.promote_types(dtype, operands.branch_scale.dtype)
    return dtype


def way_index(way: Way | Eager) -> int:
    return ANY_WAY if isinstance(way, Eager) else way.index


def _cpu_forward(operands: Operands, spec: LayerSpec, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x = operands.x
    if x.numel() == 0:
        skip = x if operands.residual is None else operands.residual
        columns = operands.weight.shape[0] + (skip.shape[-1] if spec.skip == "concat" else 0)
        return x.new_empty(*x.shape[:-1], columns), None, None
    keep = keep and not spec.recompute
    way = dispatch.layer_way(operands, spec, x.dtype)
    y, memory = cpu.forward(operands, spec, way_index(way), keep)
    return y, memory if keep else None, None


def _cpu_backward(g: Tensor, operands: Operands, memory: Tensor | None, spec: LayerSpec, wanted: Wanted) -> Gradients:
    if operands.x.numel() == 0:
        values = zip(operands[:-1], wanted, strict=True)
        return Gradients(*(torch.zeros_like(t) if is_wanted else None for t, is_wanted in values))
    way = dispatch.layer_way(operands, spec, operands.x.dtype)
    watched = recording.of(spec.watch) if spec.watch else None
    return cpu.backward(g, operands, memory, spec, wanted, way_index(way), watched)


def _resolved(operands: Operands) -> Operands:
    """Tensors whose memory says what they are: a kernel does not see the sign that a lazy negation keeps aside."""
    return Operands(*[t if t is None or not t.is_neg() else t.resolve_neg() for t in operands])


def _refuse(operands: Operands, choice: Eager) -> NoReturn:
    x = operands.x
    raise RuntimeError(f"fusedres::residual_linear was called on {x.device} in {x.dtype}: {choice.because}")


def _refuse_capture(operands: Operands, spec: LayerSpec) -> None:
    """Raises RuntimeError where a CUDA graph would record one seed, hence drop the same rows at every replay."""
    if spec.drop_path > 0 and operands.x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("drop_path cannot be captured in a CUDA graph: every replay would drop the same rows")


def _as_matrices(operands: Operands) -> Operands:
    x, residual = operands.x, operands.residual
    if x.dim() == 2 and (residual is None or residual.dim() == 2):
        return operands
    return operands._replace(
        x=x.reshape(-1, x.shape[-1]),
        residual=None if residual is None else residual.reshape(-1, residual.shape[-1]),
    )
