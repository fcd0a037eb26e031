"""The claims of `vanish`: the decades that the write-up printed, and why a skip helps ∂L/∂W."""

from __future__ import annotations

from itertools import pairwise
from math import inf, log10
from statistics import median
from typing import TYPE_CHECKING

from . import reading
from .report import Finding
from .values import NothingToMeasure

if TYPE_CHECKING:
    from .vanish import Case, Draw

NAMES = {True: "with skips", False: "without"}
DECADES = 1.0  # outside of the middle half of ours, at most, is the write-up's figure, which is of one draw
ALIVE = 1e-6  # of the last layer's gradient: in other draws the last GELU is saturated, and hardly any gradient enters
TAIL = 1e-12  # of a draw's largest gradient: what is not above is the tail of GELU' in fp32, and has no digits


def of_case(case: Case, drawn: dict[bool, list[Draw]], seed: int) -> list[Finding]:
    """The decades of the write-up, and how many layers take the skip."""
    findings = []
    for has_skips, printed in (case.printed or {}).items():
        for place, where in ((0, "first"), (-1, "last")):
            values = [draw.mean_abs[place] for draw in drawn[has_skips]]
            low, middle, high = map(log, reading.quartiles(values))
            claimed = log10(printed[place])
            findings.append(
                Finding(
                    f"{case.title}, {NAMES[has_skips]}: mean |∂L/∂W| of the {where} layer is of the decade of "
                    f"{printed[place]:.1e}, 10^{claimed:.1f}",
                    f"the middle half of {len(values)} seeds is {_power(low)} to {_power(high)}, median "
                    f"{_power(middle)}; holds there and up to {DECADES:g} decade beside",
                    low - DECADES <= claimed <= high + DECADES,
                )
            )
    skips = case.build(True, seed).skips
    taken = f"{sum(skips)} of {len(skips)} layers take the skip"
    same = all(a.mean_abs == b.mean_abs for a, b in zip(*drawn.values(), strict=True))
    if any(K == N for K, N in pairwise(case.sizes)):
        gains = [log(a.mean_abs[0]) - log(b.mean_abs[0]) for a, b in zip(*drawn.values(), strict=True)]
        measured = f"{taken}; first layer, with skips over without: median 10^{median(gains):.1f}"
        findings.append(Finding(f"{case.title}: skips keep the gradient", measured, median(gains) > 2))
    else:
        measured = f"{taken}: no two neighbours are alike. Gradients {'are equal bit for bit' if same else 'differ'}"
        findings.append(Finding(f"{case.title}: the effect of the skips has vanished", measured, same))
    return findings


def all_finite(drawn: dict[str, dict[bool, list[Draw]]]) -> Finding:
    draws = (draw for of in drawn.values() for both in of.values() for draw in both)
    return reading.all_finite("all gradients", (value for draw in draws for value in (*draw.mean_abs, *draw.total)))


def answer(drawn: dict[bool, list[Draw]]) -> list[Finding]:
    """Why a skip helps ∂L/∂W: that is made of the gradient at the layer's output, which comes through later skips.

    Draws that are not alive are left out of comparisons of digits. NothingToMeasure where none is.
    """
    alive = [(a, b) for a, b in zip(drawn[True], drawn[False], strict=True) if is_alive(a)]
    if not alive:
        raise NothingToMeasure(f"no gradient passes in any draw of case 1, of {len(drawn[True])}: try more --seeds")
    outer = reading.worst(
        abs(one.outer[i] - one.mean_abs[i]) / one.mean_abs[i]
        for pair in alive
        for one in pair
        for i in _with_digits(one)
    )
    # of the same x, W and z, and so of the same φ'(z): what differs with skips is g alone
    same = reading.worst(_unexplained(a, b) for a, b in alive)
    kept = {has: median(_ratio(draw) for draw in drawn[has]) for has in NAMES}
    alone = median(a.skips_alone[0] / a.total[0] for a, _ in alive)
    of_half = median(a.skip[0] / a.branch[0] for a, _ in alive)
    return [
        Finding(
            "∂L/∂W of a layer is the outer product of dz = g φ'(z) and x, with g what reaches the layer's OUTPUT",
            f"mean |∂L/∂W| is mean |dz| · mean |x| but for {outer:.1e} of it, over all seeds and layers "
            f"above {TAIL:.0e} of a draw's largest",
            outer < 1e-4,
        ),
        Finding(
            "so ∂L/∂W of the first layer gains from skips what g gains, and nothing else: its x, W and z are the same",
            f"(∂L/∂W with) / (∂L/∂W without) is (g with) / (g without) but for {same:.1e} of it",
            same < 1e-3,
        ),
        Finding(
            "g is ∂L/∂x of the next layer; one half of that comes through its skip as it is, as far as the first layer",
            f"from the last skip's end to the input ‖∂L/∂x‖ becomes {kept[True]:.1e} times as much with skips, "
            f"{kept[False]:.1e} without (medians); {alone:.2f} of it come through skips alone; at the first layer the "
            f"skip's half is {of_half:.1f} times the branch's",
            kept[True] > 0.1 and kept[False] < 1e-3 * kept[True],
        ),
    ]


def is_alive(draw: Draw) -> bool:
    """Whether gradient enters by the last layer and comes to the first, or is not a number."""
    return not (draw.mean_abs[-1] <= ALIVE or min(draw.total[0], draw.branch[0]) <= 0)


def _with_digits(draw: Draw) -> list[int]:
    """The layers whose gradient is above the tail, or not a number."""
    return [i for i, mean in enumerate(draw.mean_abs) if not mean <= TAIL * reading.worst(draw.mean_abs)]


def _unexplained(a: Draw, b: Draw) -> float:
    """How far (∂L/∂W with) / (∂L/∂W without) of the first layer is from (g with) / (g without), relatively."""
    gains = a.reached[0].g / b.reached[0].g
    return (a.dweight / b.dweight / gains[:, None] - 1).abs().max().item()


def _ratio(draw: Draw) -> float:
    """‖∂L/∂x‖ at the first layer over that at the last layer's input, where the last skip ends."""
    return draw.total[0] / draw.total[-1] if draw.total[-1] != 0 else 0.0


def _power(exponent: float) -> str:
    return f"10^{exponent:.1f}" if exponent > -inf else "0"


def log(value: float) -> float:
    return -inf if value == 0 else log10(value)
