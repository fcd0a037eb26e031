"""Whether an answer is right: its distance from wider arithmetic, in units of eager's own."""

from __future__ import annotations

import torch
from torch import Tensor

# How far from float64 an answer may be, in units of eager's own distance. Sums in another order stay below these;
# a lost or doubled term does not. Eager may be exact by luck, on few numbers above all: it counts as wrong by at least
# the roundings of its layers, √depth of the largest value.
MAX_LIMIT = 8.0
RMS_LIMIT = 3.0
FEW = 16  # numbers, below which tensors of one kind are compared together: alone they have no mean to speak of


def errors(
    answer: dict[str, Tensor], own: dict[str, Tensor], exact: dict[str, Tensor], depth: int
) -> dict[str, dict[str, float]]:
    """{name: {max, rms}}: distances from exact in units of `own`, eager's answer. Small tensors of a kind are one."""
    eps = torch.finfo(own["y"].dtype).eps
    found = {}
    for name, names in _together(exact).items():
        a, o, e = (torch.cat([tensors[n].double().flatten() for n in names]) for tensors in (answer, own, exact))
        if not torch.isfinite(a).all():
            found[name] = {"max": float("inf"), "rms": float("inf")}
            continue
        largest = (
            e.abs().max().clamp_min(1.0 if name == "y" else 1e-30)
        )  # an output near zero is a sum of terms near one
        unit = eps * depth**0.5 * largest
        typical = 0.29 * unit if e.numel() >= FEW else unit  # of few numbers all may be a rounding off
        mine, theirs = a - e, o - e
        found[name] = {
            "max": float(mine.abs().max() / torch.maximum(theirs.abs().max(), unit)),
            "rms": float(_rms(mine) / torch.maximum(_rms(theirs), typical)),
        }
    return found


def wrong(found: dict[str, dict[str, float]]) -> list[str]:
    """What is further from the truth than the limits allow."""
    return [
        f"{name}: largest error {error['max']:.3g} of eager's, allowed {MAX_LIMIT:g}; "
        f"rms {error['rms']:.3g}, allowed {RMS_LIMIT:g}"
        for name, error in found.items()
        if not (error["max"] <= MAX_LIMIT and error["rms"] <= RMS_LIMIT)
    ]


def worst(found: dict[str, dict[str, float]]) -> dict[str, float]:
    return {measure: max(error[measure] for error in found.values()) for measure in ("max", "rms")}


def _together(exact: dict[str, Tensor]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, tensor in exact.items():
        is_alone = tensor.numel() >= FEW or name == "y"
        groups.setdefault(name if is_alone else f"every small {name.split()[0]}", []).append(name)
    return groups


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()
