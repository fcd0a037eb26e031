"""What every study reads from its numbers: the worst and the least of them, quartiles, findings about all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite, isnan, nan

import torch

from ..gradients import GradientComparison
from .report import Finding


def worst(values: Iterable[float]) -> float:
    """The largest; NaN if any is, where `max` drops every NaN but a first one."""
    found = list(values)
    return nan if any(map(isnan, found)) else max(found)


def least(values: Iterable[float]) -> float:
    """The smallest; NaN if any is."""
    return -worst(-value for value in values)


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Of the values themselves, none between two of them: infinities may be among them. NaN if any is."""
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = torch.tensor(list(values), dtype=torch.float64).quantile(at, interpolation="nearest").tolist()
    return low, middle, high


def spread(values: Iterable[float], form: str = ".3g") -> str:
    """The least and the largest, as text."""
    found = list(values)
    ends = dict.fromkeys((f"{least(found):{form}}", f"{worst(found):{form}}"))
    return " to ".join(ends)


def all_finite(what: str, values: Iterable[float]) -> Finding:
    """A finding of the project: none of these numbers is infinite or NaN."""
    found = list(values)
    lost = sum(not isfinite(value) for value in found)
    return Finding(f"of this project: {what} are finite", f"{lost} of {len(found)} are not", bool(found) and not lost)


def agreement(comparisons: Mapping[str, GradientComparison]) -> Finding:
    """A finding of the project: fused and eager agree on every parameter's gradient, by the comparison's own rules."""
    told = ", ".join(
        f"{found.largest_relative_difference:.1g} ({name}{_objections(found)})" for name, found in comparisons.items()
    )
    return Finding(
        "of this project: fused gradients agree with eager's, being about as near to the truth",
        f"of a gradient's largest they differ by at most {told}",
        all(found.agrees for found in comparisons.values()),
    )


def _objections(found: GradientComparison) -> str:
    return "".join(f"; {one}" for one in found.objections)
