"""The sum that ends a residual block as PyTorch operators, with fakes and gradients; the only caller of its launch.

Two ways in, from cheap to general:
    a plain autograd.Function      eager mode
    fusedres::residual             compiling, exporting, under a dispatch mode, for tensor subclasses
Backward reads the branch for da alone and x for dλ alone: what is not read is not kept. Where it is to be
differentiated again it is the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference, residual_dispatch
from .dispatch import Eager, Native, Triton
from .kernels.spec import LayerSpec, Terms, WantedTerms
from .ops import needs_operator
from .residual_launch import alike, backward, forward, strides

_SCALING = (
    "Tensor? branch_scale, Tensor? skip_scale, Tensor? seed, float branch_number, float skip_number, float drop_path"
)
_DTYPES = "ScalarType branch_dtype, ScalarType x_dtype"
_LIBRARY = torch.library.Library("fusedres", "FRAGMENT")
_LIBRARY.define(f"residual(Tensor branch, Tensor x, {_SCALING}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    f"residual_backward(Tensor g, Tensor? branch, Tensor? x, {_SCALING}, {_DTYPES}, bool[] wanted) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
N_TERMS = len(Terms._fields)

Backend = Eager | Triton | Native


def residual(terms: Terms, spec: LayerSpec, choice: Backend) -> Tensor:
    """y of terms that are checked, by a backend that takes them, by the cheapest way in that this call allows."""
    if torch.compiler.is_compiling() or needs_operator(terms):
        return torch.ops.fusedres.residual(*terms, *_numbers(spec))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in terms):
        return _Residual.apply(spec, choice, *terms)
    return forward(terms, spec, choice)


def _numbers(spec: LayerSpec) -> tuple[float, float, float]:
    return spec.branch_scale, spec.skip_scale, spec.drop_path


def _spec(numbers: Sequence[float]) -> LayerSpec:
    return LayerSpec("none", "pre", "residual", numbers[1], numbers[0], numbers[2])


# ---------------------------------------------------------------------------------------------- gradients


def _save(ctx: Any, terms: Terms, spec: LayerSpec, choice: Backend, needs: Sequence[bool]) -> None:
    """Keeps what backward reads of the terms."""
    branch, x, *others = terms
    ctx.spec, ctx.choice, ctx.dtypes = spec, choice, (branch.dtype, x.dtype)
    ctx.save_for_backward(branch if needs[2] else None, x if needs[3] else None, *others)


def _differentiate(ctx: Any, g: Tensor, needs: Sequence[bool]) -> tuple:
    """The gradients of all terms, the seed's None included; a term that counts once has g itself."""
    terms, spec = ctx.saved_tensors, ctx.spec
    passes_branch = terms[2] is None and spec.branch_scale == 1.0 and spec.drop_path == 0
    passes_x = terms[3] is None and spec.skip_scale == 1.0
    wanted = WantedTerms(needs[0] and not passes_branch, needs[1] and not passes_x, needs[2], needs[3])
    found = iter(_gradients(g, terms, ctx, wanted) if any(wanted) else ())
    spread: list[Tensor | None] = [next(found) if is_wanted else None for is_wanted in wanted]
    if passes_branch and needs[0]:
        spread[0] = g.to(ctx.dtypes[0])
    if passes_x and needs[1]:
        spread[1] = g.to(ctx.dtypes[1])
    return (*spread, None)


def _gradients(g: Tensor, terms: Any, ctx: Any, wanted: WantedTerms) -> Sequence[Tensor]:
    """By a kernel; by the formula where it is differentiated, or batched; by the operator where somebody looks on."""
    if (
        isinstance(ctx.choice, Eager)
        or torch.is_grad_enabled()
        or dispatch.transforms_are_active()
        or dispatch.is_legacy_batch(g)
    ):
        return reference.residual_gradients(g, terms, ctx.spec, ctx.dtypes, wanted)
    if needs_operator((g, *terms)):
        return torch.ops.fusedres.residual_backward(g, *terms, *_numbers(ctx.spec), *ctx.dtypes, list(wanted))
    return backward(g, terms, ctx.spec, ctx.dtypes, wanted, ctx.choice)


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: LayerSpec, choice: Backend, *terms: Any) -> Tensor:
        given = Terms(*terms)
        _save(ctx, given, spec, choice, ctx.needs_input_grad[2:])
        return forward(given, spec, choice)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        return (None, None, *_differentiate(ctx, g, ctx.needs_input_grad[2:]))


# ---------------------------------------------------------------------------------------------- operators


def _laid_out(terms: Sequence[Tensor | None], spec: LayerSpec) -> tuple[int, ...]:
    """The strides of all that an operator gives, by those of the first of these that there is."""
    return strides(next(t for t in terms if t is not None), spec.drop_path > 0)


def _owned(found: Tensor, layout: tuple[int, ...]) -> Tensor:
    """The tensor as an operator's output must be: laid out as its fake is, in memory of its own."""
    copy = alike(found, layout)
    return copy.clone() if copy is found else copy


@torch.library.impl(_LIBRARY, "residual", "CompositeExplicitAutograd")
def _operator(*arguments: Any) -> Tensor:
    terms, spec = Terms(*arguments[:N_TERMS]), _spec(arguments[N_TERMS:])
    choice = _backend(terms)
    if not isinstance(choice, Eager):
        return forward(terms, spec, choice)
    return _owned(reference.residual(terms, spec), _laid_out(terms[:1], spec))


def _backend(terms: Terms) -> Backend:
    branch, x = terms.branch, terms.x
    return residual_dispatch.backend(branch, (branch.dtype, x.dtype), terms.branch_scale)


@torch.library.register_fake("fusedres::residual", lib=_LIBRARY)
def _operator_fake(*arguments: Any) -> Tensor:
    terms, spec = Terms(*arguments[:N_TERMS]), _spec(arguments[N_TERMS:])
    dtype = residual_dispatch.output_dtype((terms.branch.dtype, terms.x.dtype), terms.branch_scale)
    return _empty(terms.branch, _laid_out(terms[:1], spec), dtype)


def _empty(like: Tensor, layout: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(like.shape, layout, dtype=dtype, device=like.device)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    terms = Terms(*inputs[:N_TERMS])
    _save(ctx, terms, _spec(inputs[N_TERMS:]), _backend(terms), ctx.needs_input_grad)


def _operator_backward(ctx: Any, g: Tensor) -> tuple:
    return (*_differentiate(ctx, g, ctx.needs_input_grad), None, None, None)


def _unpacked(arguments: Sequence[Any]) -> tuple[Tensor, tuple, LayerSpec, tuple, WantedTerms]:
    g, *rest = arguments
    terms, numbers, dtypes, wanted = rest[:N_TERMS], rest[N_TERMS:-3], rest[-3:-1], rest[-1]
    return g, tuple(terms), _spec(numbers), tuple(dtypes), WantedTerms(*wanted)


@torch.library.impl(_LIBRARY, "residual_backward", "CompositeExplicitAutograd")
def _backward_operator(*arguments: Any) -> list[Tensor]:
    g, terms, spec, dtypes, wanted = _unpacked(arguments)
    choice = residual_dispatch.backend(g, dtypes, terms[2])
    if not isinstance(choice, Eager):
        return backward(g, terms, spec, dtypes, wanted, choice)
    found = reference.residual_gradients(g, terms, spec, dtypes, wanted)
    like = _backward_operator_fake(*arguments)
    return [_owned(t, other.stride()) for t, other in zip(found, like, strict=True)]


@torch.library.register_fake("fusedres::residual_backward", lib=_LIBRARY)
def _backward_operator_fake(*arguments: Any) -> list[Tensor]:
    g, terms, spec, dtypes, wanted = _unpacked(arguments)
    layout = _laid_out((*terms[:2], g), spec)
    found = [_empty(g, layout, dtype) for dtype, is_wanted in zip(dtypes, wanted[:2], strict=True) if is_wanted]
    scales = zip(terms[2:4], wanted[2:], strict=True)
    return [*found, *(t.new_empty(t.shape) for t, is_wanted in scales if is_wanted)]


def _setup_backward_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    g, terms, ctx.spec, ctx.dtypes, ctx.wanted = _unpacked(inputs)
    ctx.save_for_backward(g, *terms)


def _operator_double_backward(ctx: Any, gg: Sequence[Tensor]) -> tuple:
    *tensors, seed = ctx.saved_tensors
    at = [i for i, t in enumerate(tensors) if t is not None]

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        filled = dict(zip(at, values, strict=True))
        g, *terms = (filled.get(i) for i in range(len(tensors)))
        return reference.residual_gradients(g, (*terms, seed), ctx.spec, ctx.dtypes, ctx.wanted)

    _, pull = reference.vjp(gradients, *(tensors[i] for i in at))
    found = dict(zip(at, pull(tuple(gg)), strict=True))
    return (*(found.get(i) for i in range(len(tensors))), *(None,) * 7)


torch.library.register_autograd("fusedres::residual", _operator_backward, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_autograd(
    "fusedres::residual_backward",
    _operator_double_backward,
    setup_context=_setup_backward_context,
    lib=_LIBRARY,
)
