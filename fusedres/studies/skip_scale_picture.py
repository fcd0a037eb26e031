"""The picture of `lambda`: the fan of Πλ with what was measured, and how far that is from it by branches' scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..gradients import picture
from ..gradients.fan import STYLES, draw_fan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    depth: int,
    measured: Mapping[float, Sequence[float]],
    name: str,
    sizes: Mapping[str, float],
    moved: Mapping[float, Sequence[float]],
    near: float,
) -> Figure:
    """By λ: the coefficients `measured` with branches of the scale called `name`; and how far they are `moved` from Πλ
    by branches of these sizes, with a line at `near`.
    """
    figure = picture.new_figure(13, 5.4)
    left, right = figure.subplots(1, 2)
    draw_fan(left, depth, list(measured), measured)
    left.set_title(f"branches of scale {name}: median over seeds")
    for (scale, values), (color, line, marker) in zip(moved.items(), STYLES, strict=True):
        style = {"color": color, "marker": marker, "markerfacecolor": "none", "label": f"λ = {scale:g}"}
        right.plot(list(sizes.values()), values, linestyle=line, **style)
    right.set_xscale("log")
    right.set_yscale("log")
    right.minorticks_off()
    right.set_xticks(list(sizes.values()), list(sizes))
    right.axhline(near, color="black", linewidth=0.8)
    right.annotate(f"{near:.0%}", (min(sizes.values()), near), xytext=(0, 3), textcoords="offset points")
    right.set_xlabel("scale a of the branches")
    right.set_ylabel("largest |coefficient / Πλ - 1|")
    right.set_title("how far other paths move the coefficient")
    right.grid(axis="y", color="0.9")
    return figure
