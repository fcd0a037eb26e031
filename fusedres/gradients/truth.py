"""What the gradients of an eager model are in truth: those of a float64 copy of it, where that can be had."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import verdict
from .readout import Loss, measure

Gradients = dict[str, Tensor]
UNIT = "eager's own error against float64, at least one rounding of the largest |g|"
UNIT_OF_FLOAT64 = f"{verdict.DOUBLE.unit_roundings:g} float64 roundings of the largest |g|: nothing wider is at hand"


class Truth(NamedTuple):
    """Gradients by parameter and what a unit of error is, or why there are none; the dtype each is computed in."""

    gradients: Gradients | None
    unit: str | None
    why_none: str
    dtypes: Mapping[str, torch.dtype]


class _None(Exception):
    """Why there is no truth."""


def truth_of(eager: nn.Module, gradients: Gradients, x: Tensor, target: Tensor | None, loss_fn: Loss | None) -> Truth:
    """The truth that these gradients of eager are roundings of. Of a float64 model they are it themselves."""
    dtypes = {name: gradient.dtype for name, gradient in gradients.items()}
    if torch.is_autocast_enabled(x.device.type):
        lower = torch.get_autocast_dtype(x.device.type)
        dtypes = {name: lower if dtype == torch.float32 else dtype for name, dtype in dtypes.items()}
        why = f"autocast is active, so that eager rounds to {lower}, which a float64 copy of it would not"
        return Truth(None, None, why, dtypes)
    if set(dtypes.values()) == {torch.float64}:
        return Truth(gradients, UNIT_OF_FLOAT64, "", dtypes)
    try:
        return Truth(_of_copy(eager, gradients, x, target, loss_fn), UNIT, "", dtypes)
    except _None as reason:
        return Truth(None, None, str(reason), dtypes)


def _of_copy(
    eager: nn.Module, gradients: Gradients, x: Tensor, target: Tensor | None, loss_fn: Loss | None
) -> Gradients:
    try:
        with torch.inference_mode(False):
            _, truth = measure(deepcopy(eager).double(), _wide(x), _wide(target), loss_fn)
    except Exception as error:  # of a model that anyone may have written
        said = (str(error).splitlines() or [""])[0]
        raise _None(f"no float64 copy of eager could be made and run: {type(error).__name__}: {said}") from error
    for name, gradient in gradients.items():
        if name not in truth or truth[name].dtype != torch.float64:
            raise _None(f"the float64 copy of eager has no float64 gradient of {name}")
        if gradient.isfinite().all() and not truth[name].isfinite().all():
            raise _None(f"in the float64 copy of eager the gradient of {name} is not finite")
    allowed = max(verdict.half_the_digits(gradient.dtype) for gradient in gradients.values())
    if (distance := _distance(gradients, truth)) > allowed:
        raise _None(
            f"the float64 copy of eager has other gradients, {distance:.2g} away: it draws other random numbers, "
            "computes something else in float64, or eager has lost half of its digits"
        )
    return truth


def _distance(gradients: Gradients, truth: Gradients) -> float:
    """Of all gradients that are finite together from the truth, relative to it."""
    finite = [name for name, gradient in gradients.items() if gradient.isfinite().all()]
    away = sum((gradients[name].double() - truth[name]).square().sum().item() for name in finite)
    whole = sum(truth[name].square().sum().item() for name in finite)
    return math.sqrt(away / whole) if whole else math.inf if away else 0.0


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
