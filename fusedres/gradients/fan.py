"""The fan of Πλ: what skips scaled by λ leave of a gradient over depth, below 1, at 1 and above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from . import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = (  # colour, line, marker: by the place of a λ among those drawn, and again from the first
    (picture.VERMILION, "--", "s"),
    (picture.ORANGE, "-.", "v"),
    ("black", "-", "o"),
    (picture.SKY, ":", "^"),
    (picture.BLUE, (0, (14, 3)), "D"),
)
MOST_MARKERS = 30  # on a line


def draw_fan(
    axes: Axes, depth: int, scales: Sequence[float], measured: Mapping[float, Sequence[float]] | None = None
) -> None:
    """A line of Πλ = λ^k over k = 0 … depth layers, on a log scale, for every λ > 0 in scales, named at its end.

    measured: by λ the coefficients found at k = 0, 1, …, drawn as open markers; one that is not above 0 has no place.
    """
    axes.set_yscale("log")
    for i, scale in enumerate(scales):
        color, line, marker = STYLES[i % len(STYLES)]
        predicted = [scale**k for k in range(depth + 1)]
        label = "Πλ, predicted" if scale == 1 else None
        axes.plot(range(depth + 1), predicted, linestyle=line, color=color, label=label)
        axes.annotate(
            f"λ = {scale:g}",
            (depth, predicted[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
        )
        values = (measured or {}).get(scale, ())
        found = [(k, value) for k, value in enumerate(values) if value > 0][:: max(1, depth // MOST_MARKERS)]
        if found:
            label = "measured" if scale == 1 else None
            axes.plot(*zip(*found, strict=True), marker, color=color, markerfacecolor="none", ms=5, label=label)
    axes.set_xlim(right=1.16 * depth)  # room for the names
    axes.set_xlabel("layers between, L - l")
    axes.set_ylabel("share of ∂L/∂x_L in ∂L/∂x_l")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
