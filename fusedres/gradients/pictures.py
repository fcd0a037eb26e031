"""Pictures of a training's readouts: gradients over depth, by layer and step, and their two halves over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any

from . import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .readout import GradientProfile

MOST_CURVES = 5  # that can be told apart
MOST_PANELS = 6
SHADES = ("0.75", picture.SKY, picture.BLUE, picture.VERMILION, "black")
LINES, MARKERS = (":", "-.", "--", "-", "-"), ("v", "s", "^", "D", "o")


def plot_depth(profiles: Sequence[GradientProfile], path: str | PathLike[str]) -> None:
    """mean |∂L/∂W| over the weights in the order of the model, a line for each of up to five steps."""
    _require(profiles)
    chosen = _spread(profiles, MOST_CURVES)
    figure = picture.new_figure(8, 5)
    axes = figure.subplots()
    styles = list(zip(SHADES, LINES, MARKERS, strict=True))[-len(chosen) :]
    series = [
        picture.Series(f"step {one.step}", one.mean_abs, color, line, marker)
        for one, (color, line, marker) in zip(chosen, styles, strict=True)
    ]
    picture.draw_gradients(axes, series)
    axes.set_title(chosen[-1].skips)
    picture.save(figure, path)


def plot_heatmap(profiles: Sequence[GradientProfile], path: str | PathLike[str]) -> None:
    """log₁₀ mean |∂L/∂W| as brightness, weights from top to bottom, steps from left to right; zeros are left out."""
    _require(profiles)
    names = list({name: None for one in profiles for name in one.mean_abs})
    figure = picture.new_figure(8, max(3.0, min(10.0, 1.5 + 0.22 * len(names))))
    axes = figure.subplots()
    values = [[_log10(one.mean_abs.get(name, 0.0)) for one in profiles] for name in names]
    steps = [one.step for one in profiles]
    image = axes.pcolormesh(_edges(steps), range(len(names) + 1), values, cmap="cividis", shading="flat")
    axes.invert_yaxis()
    axes.set_facecolor("0.85")
    every = math.ceil(len(names) / picture.MOST_LABELS)
    labels = [name.removesuffix(".weight") for name in names][::every]
    axes.set_yticks([i + 0.5 for i in range(0, len(names), every)], labels, fontsize="small")
    axes.set_xlabel("step")
    axes.set_ylabel("weight, in the order of the model")
    figure.colorbar(image, ax=axes, label="log₁₀ mean |∂L/∂W|")
    figure.savefig(path, dpi=200)


def plot_halves(profiles: Sequence[GradientProfile], path: str | PathLike[str]) -> None:
    """A panel for each of up to six layers that take a skip: the norms through branch and skip."""
    _require(profiles)
    names = list({n: None for profile in profiles for n, one in profile.inputs.items() if one.halves is not None})
    if not names:
        raise ValueError("no readout has the two halves of a gradient: no layer takes a skip whose input requires one")
    chosen = _spread(names, MOST_PANELS)
    columns = min(3, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = picture.new_figure(4 * columns, 2.8 * rows + 0.6)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(chosen) :]:
        axes.remove()
    for i, (axes, name) in enumerate(zip(grid.flat, chosen, strict=False)):
        draw_halves(axes, profiles, name)
        axes.set_title(name, fontsize="medium")
        if i + columns >= len(chosen):
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
        if i % columns == 0:
            axes.set_ylabel("norm of ∂L/∂x")
    picture.save(figure, path)


def draw_halves(axes: Axes, profiles: Sequence[GradientProfile], layer: str) -> None:
    """The norms of what reaches a layer's input through its branch and through its skip, over steps."""
    found = [(one.step, one.inputs[layer]) for one in profiles if layer in one.inputs]
    steps = [step for step, _ in found]
    marker = "." if len(steps) < 40 else ""
    curves = {
        "in all": ([one.statistics.norm for _, one in found], "0.6", "-", 3.0),
        "through the branch, dz W": (
            [math.nan if one.halves is None else one.halves.branch for _, one in found], picture.VERMILION, "--", 1.5,
        ),
        "through the skip, λ ∂L/∂y": (
            [math.nan if one.halves is None else one.halves.skip for _, one in found], picture.BLUE, "-", 1.5,
        ),
    }  # fmt: skip
    for label, (values, color, line, width) in curves.items():
        shown = [value if value > 0 else math.nan for value in values]
        axes.plot(steps, shown, line, color=color, linewidth=width, marker=marker, label=label)
    axes.set_yscale("log")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _require(profiles: Sequence[GradientProfile]) -> None:
    if not profiles:
        raise ValueError("there is nothing to draw before the first readout")


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """The first, the last, and as many between as may be."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _log10(value: float) -> float:
    return math.log10(value) if 0 < value < math.inf else math.nan


def _edges(steps: Sequence[int]) -> list[float]:
    """Where the columns of a heat map begin and end: halfway between steps."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    return [steps[0] - (middles[0] - steps[0]), *middles, steps[-1] + (steps[-1] - middles[-1])]
