"""The fused layer as PyTorch operators, with fakes and gradients.

Three ways in, from cheap to general (measured: `python bench/overhead.py`); a plain call on a CPU is the engine's own
(`plain_layer.py`), whose backward comes here where it is to be differentiated again, batched, or looked at:
    a plain autograd.Function      eager mode
    a setup_context Function       inside torch.func transforms
    fusedres::residual_linear      compiling, exporting, under a dispatch mode, for tensor subclasses
Double backward differentiates the reference from the layer's inputs: what forward kept is a constant to autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import dispatch, philox, recording, reference
from .kernels.cpu import plan
from .kernels.spec import Gradients, LayerSpec, NetworkSpec, Operands, Slots, Wanted
from .launch import backward as _backward
from .launch import forward as _forward
from .launch import kept as _kept
from .launch import output_dtype as _output_dtype

_reference_gradients = reference.layer_gradients
N_OPERANDS = len(Operands._fields)
N_SPEC = len(LayerSpec._fields)

_OPERANDS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? projection_weight, Tensor? projection_bias, "
    "Tensor? skip_scale, Tensor? branch_scale, Tensor? seed"
)
_SPEC = (
    "str activation, str order, str skip, float skip_number, float branch_number, float drop_path, bool recompute, "
    "bool batch_invariant, int watch"
)
_LIBRARY = torch.library.Library("fusedres", "DEF")
_LIBRARY.define(
    f"residual_linear({_OPERANDS}, {_SPEC}, bool keep) -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIBRARY.define(
    f"residual_linear_backward(Tensor g, Tensor kept, Tensor s, {_OPERANDS}, {_SPEC}, bool[] wanted)"
    f" -> ({', '.join(['Tensor'] * len(Gradients._fields))})",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "layer_backward(Tensor g, Tensor x, Tensor? residual, Tensor[] parameters, Tensor? seeds, int[] codes, "
    "float[] numbers, bool[] wanted) -> Tensor[]"
)
_LIBRARY.define("draw_seed() -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded))


# ---------------------------------------------------------------------------------------------- calling


def residual_linear(operands: Operands, spec: LayerSpec) -> Tensor:
    """y of a layer whose operands are checked and cast, by the cheapest way in that this call allows."""
    if dispatch.transforms_are_active():
        return _TransformableLayer.apply(spec, *operands)[0]
    keep = needs_grad(operands)
    if torch.compiler.is_compiling() or needs_operator(operands):
        return torch.ops.fusedres.residual_linear(*operands, *spec, keep)[0]
    if keep:
        return _Layer.apply(spec, *operands)
    return _forward(operands, spec, keep=False)[0]


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def needs_operator(tensors: Sequence[Tensor | None]) -> bool:
    """Whether somebody else is to see the call: a dispatch mode, or a tensor subclass."""
    if dispatch.modes_in_force() > 0:
        return True
    return any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors if t is not None)


def draw_seed() -> Tensor:
    """A seed for one call; an operator while compiling, so that compiled code draws what eager code would."""
    # torch.vmap knows how to batch randint, and does not know the operator
    is_traced = torch.compiler.is_compiling() and not dispatch.transforms_are_active()
    return torch.ops.fusedres.draw_seed() if is_traced else philox.draw_seed()


# ---------------------------------------------------------------------------------------------- gradients


def _saved(operands: Sequence[Any], spec: LayerSpec) -> Sequence[Any]:
    """What backward reads of the operands: a residual whose value does not matter to it is let go, as eager's is."""
    given = Operands(*operands)
    reads_residual = given.skip_scale is not None or spec.activates_sum
    if given.residual is None or reads_residual:
        return operands
    return given._replace(residual=given.residual.new_empty(()).expand(given.residual.shape))


def _split(saved: Sequence[Any]) -> tuple[Operands, Tensor | None, Tensor | None]:
    *operands, kept, s = saved
    kept, s = (None if t is None or t.numel() == 0 else t for t in (kept, s))
    return Operands(*operands), kept, s


def _skip_passes_through(operands: Operands, spec: LayerSpec) -> bool:
    """Whether the residual's gradient is g itself, which then need not pass through a kernel."""
    return spec.skip == "residual" and not spec.activates_sum and operands.skip_scale is None and spec.skip_scale == 1.0


def _differentiate(call: Any, g: Tensor, saved: Sequence[Any], spec: LayerSpec, needs: Sequence[bool]) -> tuple:
    """The gradients of all operands, the seed's None included; `call(g, operands, kept, s, spec, wanted)` has them."""
    operands, kept, s = _split(saved)
    wanted = Wanted(*needs[: len(Wanted._fields)])
    passes = wanted.residual and _skip_passes_through(operands, spec)
    if passes:
        wanted = wanted._replace(residual=False)
    gradients = call(g, operands, kept, s, spec, wanted)
    return (*(gradients._replace(residual=g) if passes else gradients), None)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: LayerSpec, *operands: Tensor | None) -> Tensor:
        y, kept, s = _forward(Operands(*operands), spec, keep=True)
        ctx.save_for_backward(*_saved(operands, spec), kept, s)
        ctx.spec = spec
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        is_plain = not (torch.is_grad_enabled() or dispatch.transforms_are_active())
        call = _visible_backward if is_plain else _differentiable_backward
        spec = ctx.spec if is_plain else _unwatched(ctx.spec)
        return (None, *_differentiate(call, g, ctx.saved_tensors, spec, ctx.needs_input_grad[1:]))


class _TransformableLayer(torch.autograd.Function):
    """The same for torch.func, where everything saved must be an input or an output."""

    @staticmethod
    def forward(spec: LayerSpec, *operands: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return _visible_forward(Operands(*operands), spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        spec, *operands = inputs
        _, kept, s = output
        ctx.mark_non_differentiable(*(t for t in (kept, s) if t is not None))
        ctx.save_for_backward(*operands, kept, s)
        ctx.spec = spec

    @staticmethod
    def backward(ctx: Any, g: Tensor, _z: Any, _s: Any) -> tuple:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        return (None, *_differentiate(_differentiable_backward, g, saved, _unwatched(ctx.spec), needs))


class _Gradients(torch.autograd.Function):
    """The backward as a differentiable function of g and the operands; kept and s only spare it work."""

    @staticmethod
    def forward(
        spec: LayerSpec, wanted: Wanted, kept: Tensor | None, s: Tensor | None, g: Tensor, *operands: Any
    ) -> tuple:
        return tuple(_visible_backward(g, Operands(*operands), kept, s, spec, wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.spec, ctx.wanted, _, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gg: Tensor | None) -> tuple:
        return (None, None, None, None, *_double_backward(gg, ctx.saved_tensors, ctx.spec, ctx.wanted))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, spec: LayerSpec, wanted: Wanted, kept: Any, s: Any, *tensors: Any) -> tuple:
        def gradients(g: Tensor, *operands: Any) -> tuple:
            return _reference_gradients(g, Operands(*operands), spec, wanted)

        # a batch of gradients, or of weights, has no kernel: the formula does it
        some = torch.vmap(gradients, in_dims[4:], randomness=info.randomness)(*tensors)
        return _spread(some, wanted), _spread((0,) * len(some), wanted)


def _visible_forward(operands: Operands, spec: LayerSpec) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """_forward, as an operator where somebody else is to see it."""
    dtype, keeps_skip = _kept(operands, spec, keep=True)
    if not needs_operator(operands):
        return _forward(operands, spec, dtype is not None or keeps_skip)
    y, kept, s = torch.ops.fusedres.residual_linear(*operands, *spec, True)
    return y, None if dtype is None else kept, s if keeps_skip else None


def _visible_backward(
    g: Tensor, operands: Operands, kept: Tensor | None, s: Tensor | None, spec: LayerSpec, wanted: Wanted
) -> Gradients:
    """_backward, as an operator where somebody else is to see it."""
    if dispatch.is_legacy_batch(g):  # a batch of gradients (is_grads_batched=True) has no kernel: the formula does it
        return _spread(_reference_gradients(g, operands, spec, wanted), wanted)
    if needs_operator((g, operands.x)):
        return _call_backward_operator(g, operands, kept, s, spec, wanted)
    return _backward(g, operands, _as_matrix(kept), _as_matrix(s), spec, wanted)


def _unwatched(spec: LayerSpec) -> LayerSpec:
    """The same for gradients that are differentiated themselves."""
    if not spec.watch:
        return spec
    recording.spoil(spec.watch)
    return spec._replace(watch=0)


def _differentiable_backward(
    g: Tensor, operands: Operands, kept: Tensor | None, s: Tensor | None, spec: LayerSpec, wanted: Wanted
) -> Gradients:
    return Gradients(*_Gradients.apply(spec, wanted, kept, s, g, *operands))


@torch.library.impl(_LIBRARY, "layer_backward", "FuncTorchDynamicLayerFrontMode")  # transforms see what is in it
@torch.library.impl(_LIBRARY, "layer_backward", "Batched")
@torch.library.impl(_LIBRARY, "layer_backward", "CompositeImplicitAutograd")
def _layer_backward(
    g: Tensor,
    x: Tensor,
    residual: Tensor | None,
    parameters: Sequence[Tensor],
    seeds: Tensor | None,
    codes: Sequence[int],
    numbers: Sequence[float],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The backward of the engine's own node of a layer where that is to be differentiated, batched, or looked at.

    wanted, and what is returned: of x, residual, parameters.
    """
    (layer,) = plan.decoded(tuple(codes), tuple(numbers)).layers
    (own,) = NetworkSpec([layer]).tensors(parameters)
    operands = layer.operands(x, own, None if seeds is None else seeds[0])._replace(residual=residual)
    names = ["x", "residual", *(name for name in Slots._fields if getattr(layer.slots, name) >= 0)]
    places = [Operands._fields.index(name) for name in names]
    needs = [False] * N_OPERANDS
    for place, is_wanted in zip(places, wanted, strict=True):
        needs[place] = is_wanted
    is_plain = not (torch.is_grad_enabled() or dispatch.transforms_are_active())
    call = _visible_backward if is_plain else _differentiable_backward
    found = _differentiate(call, g, (*operands, None, None), layer.spec, needs)
    return [found[place] for place, is_wanted in zip(places, wanted, strict=True) if is_wanted]


def _spread(values: Sequence[Any], wanted: Wanted) -> Gradients:
    """One entry per operand: the next value where wanted, else None."""
    rest = iter(values)
    return Gradients(*[next(rest) if is_wanted else None for is_wanted in wanted])


def _double_backward(gg: Sequence[Tensor | None], tensors: Sequence[Any], spec: LayerSpec, wanted: Wanted) -> tuple:
    """Gradients with respect to (g, *operands) of the backward, given those of its outputs; None for the seed."""
    at = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(tensors)
        for i, value in zip(at, values, strict=True):
            filled[i] = value
        g, *operands = filled
        return _reference_gradients(g, Operands(*operands), spec, wanted)

    _, pull = reference.vjp(gradients, *(tensors[i] for i in at))
    found = pull(tuple(t for t, is_wanted in zip(gg, wanted, strict=True) if is_wanted))
    spread: list[Tensor | None] = [None] * len(tensors)
    for i, value in zip(at, found, strict=True):
        spread[i] = value
    return tuple(spread)


# ---------------------------------------------------------------------------------------------- operators


def _unpack(arguments: Sequence[Any]) -> tuple[Operands, LayerSpec, Any]:
    """(operands, spec, last argument) from an operator's flat arguments."""
    *flat, last = arguments
    return Operands(*flat[:N_OPERANDS]), LayerSpec(*flat[N_OPERANDS:]), last


@torch.library.impl(_LIBRARY, "residual_linear", "CompositeExplicitAutograd")
def _residual_linear(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, spec, keep = _unpack(arguments)
    dtype, keeps_skip = _kept(operands, spec, keep)
    found = _forward(operands, spec, dtype is not None or keeps_skip)
    y, kept, s = (operands.x.new_empty(0) if t is None else t for t in found)
    return y, _led(kept, operands.x), _led(s, operands.x)


def _led(kept: Tensor, x: Tensor) -> Tensor:
    """[M, N] as [..., N], so that whoever divides x along a leading dimension divides it alike."""
    return kept.view(*x.shape[:-1], -1) if x.dim() > 2 and kept.numel() > 0 else kept


def _as_matrix(kept: Tensor | None) -> Tensor | None:
    return kept.reshape(-1, kept.shape[-1]) if kept is not None and kept.dim() > 2 else kept


@torch.library.register_fake("fusedres::residual_linear", lib=_LIBRARY)
def _residual_linear_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, spec, keep = _unpack(arguments)
    x, N = operands.x, operands.weight.shape[0]
    columns = N + ((x if operands.residual is None else operands.residual).shape[-1] if spec.skip == "concat" else 0)
    y = x.new_empty(*x.shape[:-1], columns, dtype=_output_dtype(operands))
    leading = x.shape[:-1] if x.dim() > 2 else (prod(x.shape[:-1]),)  # numel() turns a symbolic size into a number
    dtype, keeps_skip = _kept(operands, spec, keep)
    kept = x.new_empty(0) if dtype is None else x.new_empty(*leading, N, dtype=dtype)
    return y, kept, x.new_empty(*leading, N) if keeps_skip else x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    operands, ctx.spec, _ = _unpack(inputs)
    _, kept, s = output
    ctx.save_for_backward(*_saved(operands, ctx.spec), kept, s)


def _operator_backward(ctx: Any, g: Tensor, _z: Tensor, _s: Tensor) -> tuple:
    call = _differentiable_backward if dispatch.transforms_are_active() else _call_backward_operator
    spec = _unwatched(ctx.spec) if torch.is_grad_enabled() else ctx.spec
    gradients = _differentiate(call, g, ctx.saved_tensors, spec, ctx.needs_input_grad)
    return (*gradients, *(None,) * (N_SPEC + 1))


def _call_backward_operator(
    g: Tensor, operands: Operands, kept: Tensor | None, s: Tensor | None, spec: LayerSpec, wanted: Wanted
) -> Gradients:
    kept, s = (g.new_empty(0) if t is None else t for t in (kept, s))
    found = torch.ops.fusedres.residual_linear_backward(g, kept, s, *operands, *spec, list(wanted))
    return Gradients(*(t if is_wanted else None for t, is_wanted in zip(found, wanted, strict=True)))


@torch.library.impl(_LIBRARY, "residual_linear_backward", "CompositeExplicitAutograd")
def _residual_linear_backward(g: Tensor, kept: Tensor, s: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    operands, spec, wanted = _unpack(arguments)
    _, kept, s = _split((*operands, kept, s))
    gradients = _backward(g, operands, _as_matrix(kept), _as_matrix(s), spec, Wanted(*wanted))
    return tuple(g.new_empty(0) if t is None else _owned(t, g) for t in gradients)


def _owned(gradient: Tensor, g: Tensor) -> Tensor:
    """The gradient dense and in storage of its own, as an operator's output must be: not in g's, nor in another's."""
    storage = gradient.untyped_storage()
    is_alone = storage.nbytes() == gradient.nbytes and storage.data_ptr() != g.untyped_storage().data_ptr()
    return gradient if is_alone and gradient.is_contiguous() else gradient.clone(memory_format=torch.contiguous_format)


@torch.library.register_fake("fusedres::residual_linear_backward", lib=_LIBRARY)
def _residual_linear_backward_fake(g: Tensor, kept: Tensor, s: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    operands, _, wanted = _unpack(arguments)
    return tuple(
        t.new_empty(t.shape) if is_wanted else g.new_empty(0)
        for t, is_wanted in zip(operands[:-1], wanted, strict=True)
    )


def _setup_backward_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    g, _, _, *arguments = inputs
    operands, ctx.spec, wanted = _unpack(arguments)
    ctx.wanted = Wanted(*wanted)
    ctx.save_for_backward(g, *operands)


def _operator_double_backward(ctx: Any, *gg: Tensor) -> tuple:
    g, *operands = _double_backward(gg, ctx.saved_tensors, ctx.spec, ctx.wanted)
    return (g, None, None, *operands, *(None,) * (N_SPEC + 1))


torch.library.register_autograd(
    "fusedres::residual_linear", _operator_backward, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "fusedres::residual_linear_backward",
    _operator_double_backward,
    setup_context=_setup_backward_context,
    lib=_LIBRARY,
)
torch.library.impl(_LIBRARY, "draw_seed", "CompositeExplicitAutograd")(philox.draw_seed)


@torch.library.register_fake("fusedres::draw_seed", lib=_LIBRARY)
def _draw_seed_fake() -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")
