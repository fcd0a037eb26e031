"""When a fused gradient agrees with eager's: rules with names and reasons, in units of eager's own rounding error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

AGREES, DIFFERS, NOT_FINITE = "agrees", "DIFFERS", "not finite"
FEW = 16  # fewer numbers have no mean to speak of: the largest error speaks for them


class Errors(NamedTuple):
    """How far a parameter's fused gradient is from eager's, and in units from the truth; None where there is none.

    A unit is the error of eager's own gradient against the truth, and one rounding of the largest |g| at least, so that
    it is never 0. inf where a gradient is not finite.

    Attributes:
        absolute: max |fused - eager|.
        relative: of max |eager|.
        numbers: how many there are.
        max_units: the largest error.
        rms_units: the root mean square of the errors.
        roundings: max |fused - truth| in roundings of the largest |truth|.
    """

    absolute: float
    relative: float
    numbers: int
    max_units: float | None = None
    rms_units: float | None = None
    roundings: float | None = None


class LayerVerdict(NamedTuple):
    """What is said of a layer.

    Attributes:
        verdict: agrees, DIFFERS or not finite.
        because: why; empty where it agrees.
        worst: the largest of each error over the layer's parameters.
    """

    verdict: str
    because: str
    worst: Errors


@dataclass(frozen=True)
class Rule:
    """Fused agrees if it is no further from the truth than these multiples of eager, or than so many roundings."""

    name: str
    max_units: float
    rms_units: float
    roundings: float
    unit_roundings: float = 1.0  # that a unit has at least

    def __str__(self) -> str:
        luck = f", or of {self.roundings:g} roundings of the largest |g|" if self.roundings else ""
        return f"{self.name}: an error of at most {self.max_units:g} units (rms {self.rms_units:g}){luck}"

    def objection(self, errors: Errors) -> str:
        """What is against these errors; empty if they agree."""
        max_units, rms_units, roundings = cast(tuple[float, float, float], errors[3:])
        if roundings <= self.roundings:
            return ""
        if max_units > self.max_units:
            return f"is off by {max_units:.3g} units and {roundings:.3g} roundings of its largest"
        if errors.numbers >= FEW and rms_units > self.rms_units:
            return f"is off by {rms_units:.3g} units rms and {roundings:.3g} roundings of its largest"
        return ""


# Single precision: both round after every operation and sum in different orders, neither the better one. Errors of the
# layers add up to one that moves a whole network, so that eager may be right by luck, in one sum or in all: of 3000
# random networks of up to 30 layers fused was up to 200 roundings off where eager was 5, and once 600. A wrong formula
# is off by 10 000 and more.
SINGLE = Rule("float32", max_units=16.0, rms_units=12.0, roundings=512.0)

# Half precision: few digits leave no more room for luck than units give: 16 roundings, of which a unit is one at least,
# are 12 % of the largest in bfloat16 and 1.6 % in float16. Where a relu's z rounds across 0, slopes differ by more.
HALF = Rule("half precision", max_units=16.0, rms_units=12.0, roundings=0.0)

# Double precision: no wider truth is at hand, so eager is the truth and a unit is a number of roundings: of 600 random
# networks one in a hundred amplified one rounding 4096 times. Where eager's own formula cancels, as Φ(z) + z φ(z) of
# gelu' does for z below -5, it may lose all digits, and a fused one that keeps them is called different.
DOUBLE = Rule("float64", max_units=16.0, rms_units=16.0, roundings=0.0, unit_roundings=1024.0)


def rule_for(dtype: torch.dtype) -> Rule:
    """The rule for gradients of this dtype."""
    if dtype == torch.float64:
        return DOUBLE
    return SINGLE if dtype == torch.float32 else HALF


def errors_of(fused: Tensor, eager: Tensor, truth: Tensor | None) -> Errors:
    """The errors of a fused gradient, of any shape; truth in float64, or None."""
    if eager.numel() == 0:
        return Errors(0.0, 0.0, 0, *(None if truth is None else 0.0,) * 3)
    f, e = fused.double(), eager.double()
    if truth is None:
        absolute, largest = torch.stack([(f - e).abs().max(), e.abs().max()]).tolist()
        return Errors(*_against_eager(absolute, largest), eager.numel())
    of_fused, of_eager = (f - truth).abs(), (e - truth).abs()
    reduced = [(f - e).abs().max(), e.abs().max(), truth.abs().max(), of_fused.max(), of_eager.max()]
    found = torch.stack([*reduced, _rms(of_fused), _rms(of_eager)]).tolist()
    absolute, largest, largest_truth, worst, worst_of_eager, rms, rms_of_eager = found
    rounding = _rounding(eager.dtype, largest_truth)
    floor = rounding * rule_for(eager.dtype).unit_roundings
    units = worst / max(worst_of_eager, floor), rms / max(rms_of_eager, 0.29 * floor), worst / rounding
    finite = [unit if math.isfinite(unit) else math.inf for unit in units]
    return Errors(*_against_eager(absolute, largest), eager.numel(), *finite)


def _against_eager(absolute: float, largest: float) -> tuple[float, float]:
    """(absolute, relative): 0 where both gradients are 0, inf where only eager's is and where either is not finite."""
    if not (math.isfinite(absolute) and math.isfinite(largest)):
        return math.inf, math.inf
    if absolute == 0:
        return 0.0, 0.0
    return absolute, absolute / largest if largest > 0 else math.inf


def _rounding(dtype: torch.dtype, largest: float) -> float:
    """One rounding in this dtype of the largest number.

    Of a truth that is exactly 0, one of float64 near one: its own formula rounds what is less to 0, as 1 + erf(z) does.
    """
    facts = torch.finfo(dtype)
    smallest = facts.smallest_normal * facts.eps
    return max(smallest, facts.eps * largest if largest > 0 else torch.finfo(torch.float64).eps)


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()


def by_layer(errors: Mapping[str, Errors], dtypes: Mapping[str, torch.dtype]) -> dict[str, LayerVerdict]:
    """The verdict on every module that owns parameters, in the order of the first of them; "(model)" is the outermost.

    Each by the rule of its dtype; without units by half of that dtype's digits, which no mere rounding loses.
    """
    owned: dict[str, dict[str, Errors]] = {}
    for name, found in errors.items():
        owned.setdefault(owner(name), {})[name] = found
    return {layer: _judged(own, dtypes) for layer, own in owned.items()}


def rules(dtypes: Iterable[torch.dtype], has_units: bool) -> tuple[str, ...]:
    """What these dtypes are judged by, in words."""
    used = sorted(set(dtypes), key=lambda dtype: torch.finfo(dtype).eps)
    if has_units:
        return tuple(dict.fromkeys(str(rule_for(dtype)) for dtype in used))
    return tuple(f"{dtype}: relative differences of at most {half_the_digits(dtype):.2g}" for dtype in used)


def owner(parameter: str) -> str:
    """The layer that a parameter belongs to: the module that owns it."""
    return parameter.rpartition(".")[0] or "(model)"


def _judged(own: Mapping[str, Errors], dtypes: Mapping[str, torch.dtype]) -> LayerVerdict:
    columns = zip(*own.values(), strict=True)
    largest: list[Any] = [max(values) if values[0] is not None else None for values in columns]
    worst = Errors(*largest)
    short = {name: name.rpartition(".")[2] for name in own}
    if not_finite := [short[name] for name, found in own.items() if not math.isfinite(found.absolute)]:
        return LayerVerdict(NOT_FINITE, f"the gradient of {', '.join(not_finite)} is not finite", worst)
    objections = []
    for name, found in own.items():
        has_units = found.max_units is not None
        against = rule_for(dtypes[name]).objection(found) if has_units else _relative_objection(found, dtypes[name])
        if against:
            objections.append((found.relative, f"{short[name]} {against}"))
    return LayerVerdict(DIFFERS, max(objections)[1], worst) if objections else LayerVerdict(AGREES, "", worst)


def _relative_objection(errors: Errors, dtype: torch.dtype) -> str:
    allowed = half_the_digits(dtype)
    if errors.relative <= allowed:
        return ""
    return f"differs by {errors.relative:.3g} of eager's largest, above {allowed:.3g}"


def half_the_digits(dtype: torch.dtype) -> float:
    """√eps of this dtype: 3.5e-4 in float32, 0.09 in bfloat16."""
    return math.sqrt(torch.finfo(dtype).eps)
