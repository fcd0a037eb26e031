"""A layer's plain call on a CPU, at the price of one operation: what its arguments decide is found out once.

Plain is a call of torch's own tensors that nobody bends, looks at or differentiates forward; `functional.layer` has the
others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import forward_ad
from torch.jit import is_tracing
from torch.nn import Parameter

from . import checks, dispatch, explanation, philox
from .dispatch import Native, Way, is_any_autocast_enabled, modes_in_force, transforms_are_active
from .kernels.cpu import launch
from .kernels.cpu.plan import layer_plan
from .kernels.spec import LayerSpec, Operands


class _Known(NamedTuple):
    """What is left to know of a call whose facts have been met."""

    plan: Tensor
    way: int
    keep: bool
    drops: bool
    has_more: bool  # tensors besides x, weight, bias and residual


_NONE = type(None)
_UNKNOWN: Any = object()
_KNOWN: dict[tuple[Any, ...], _Known | None] = {}
_MOST = 4096


def call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    projection_weight: Tensor | None,
    projection_bias: Tensor | None,
    skip_scale: float | Tensor,
    branch_scale: float | Tensor,
    options: tuple[Any, ...],
) -> Tensor | None:
    """y of x on a CPU, or None where the call is not plain, or not the engine's."""
    is_bent_or_watched = (  # written out: a function's call shows in a small layer's time
        modes_in_force()
        or transforms_are_active()
        or dispatch.is_switched()
        or explanation.is_listening()
        or is_any_autocast_enabled()
        or getattr(forward_ad, "_current_level", -1) >= 0
    )
    if is_bent_or_watched:
        return None
    try:
        facts = (
            x.shape,
            x.dtype,
            weight.shape,
            options,
            skip_scale if type(skip_scale) is float else type(skip_scale),  # True equals 1.0
            branch_scale if type(branch_scale) is float else type(branch_scale),
            type(options[4]),
            type(weight),
            type(bias),
            type(residual),
            type(projection_weight),
            type(projection_bias),
        )
        known = _KNOWN.get(facts, _UNKNOWN)
    except (AttributeError, TypeError):  # no tensor, or an option that is wrong: an error to be told
        return None
    if known is _UNKNOWN:
        given = Operands(x, weight, bias, residual, projection_weight, projection_bias)
        known = _remember(facts, given, skip_scale, branch_scale, options)
    if known is None:
        return None
    plan, way, keep, drops, has_more = known
    more: Any = ()
    if has_more:
        every = (projection_weight, projection_bias, skip_scale, branch_scale)
        more = [t for t in every if isinstance(t, Tensor)]
    seed = philox.draw_seed() if drops else None
    try:
        return launch.layer(plan, way, x, weight, bias, residual, keep, seed, more)
    except RuntimeError:  # where it is the caller's mistake, in their words
        given = Operands(x, weight, bias, residual, projection_weight, projection_bias)
        checks.described(given, skip_scale, branch_scale, options, False)
        raise


def _remember(
    facts: tuple[Any, ...],
    given: Operands,
    skip_scale: float | Tensor,
    branch_scale: float | Tensor,
    options: tuple[Any, ...],
) -> _Known | None:
    """Raises what `checks.described` does."""
    if is_tracing():  # sizes are tensors then, and no two calls have the same
        return None
    if len(_KNOWN) >= _MOST:
        _KNOWN.pop(next(iter(_KNOWN)), None)  # the oldest
    known = None
    if _is_plain(given, skip_scale, branch_scale):
        known = _found(*checks.described(given, skip_scale, branch_scale, options, False))
    _KNOWN[facts] = known
    return known


def _is_plain(given: Operands, skip_scale: float | Tensor, branch_scale: float | Tensor) -> bool:
    """Whether its tensors are of torch's own types, and its numbers floats."""
    are_tensors = all(type(t) in (Tensor, Parameter, _NONE) for t in given)
    return are_tensors and all(type(scale) in (float, Tensor, Parameter) for scale in (skip_scale, branch_scale))


def _found(given: Operands, spec: LayerSpec) -> _Known | None:
    """What is to be known of a call that is checked; None where another way takes it."""
    is_empty = any(t is not None and t.numel() == 0 for t in given)
    choice = dispatch.backend(given.x.device, given.x.dtype)
    if is_empty or not isinstance(choice, Native) or spec.skip == "concat":
        return None
    way = dispatch.layer_way(given, spec, given.x.dtype)
    if not isinstance(way, Way):
        return None
    own = given[1:3] + given[4:8]  # in the order of Slots
    N, K = given.weight.shape
    layer = layer_plan(spec._replace(recompute=False), N, K, tuple([t is not None for t in own]))
    return _Known(layer, way.index, not spec.recompute, spec.drop_path > 0, any(t is not None for t in own[2:]))


def forget() -> None:
    """What calls have met, as after a change of what dispatch chooses from."""
    _KNOWN.clear()
