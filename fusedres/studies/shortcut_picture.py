"""The picture of `shortcut`: gradients as the write-up read them, gradients and trainings on equal budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ..gradients import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {  # colour, line, marker
    "none": (picture.VERMILION, "--", "s"),
    "none, even": (picture.GREY, "--", "v"),
    "identity": (picture.BLUE, "-", "o"),
    "projection": (picture.SKY, "-.", "^"),
    "dense": ("black", ":", "D"),
}


def draw(
    as_written: Mapping[str, Sequence[Mapping[str, float]]], found: Mapping[str, Sequence[Any]], smoothed: int
) -> Figure:
    """Medians over seeds; losses as means of `smoothed` steps."""
    figure = picture.new_figure(16, 5.6)
    left, middle, right = figure.subplots(1, 3)
    picture.draw_gradients(left, [_series(name, readouts) for name, readouts in as_written.items()])
    left.set_title("as written: with projections and with none")
    for name, runs in found.items():
        layers = [[value for key, value in one.mean_abs.items() if "projection" not in key] for one in runs]
        color, line, marker = STYLES[name]
        values = torch.tensor(layers).quantile(0.5, 0)
        middle.plot(range(len(values)), values, line, color=color, marker=marker, markerfacecolor="none", label=name)
        _draw_losses(right, name, torch.tensor([one.losses for one in runs]), smoothed)
    middle.set_yscale("log")
    middle.set_xticks(range(len(values)))
    middle.set_xlabel("layer, from the input to the loss")
    middle.set_ylabel("mean |∂L/∂W| of layers' weights")
    middle.set_title("equal numbers of parameters, at the start")
    right.set_yscale("log")
    right.set_xlabel("step")
    right.set_ylabel(f"mean square error, mean of {smoothed} steps")
    right.set_title("in training: median, range at the end")
    for axes in (middle, right):
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    return figure


def _series(name: str, readouts: Sequence[Mapping[str, float]]) -> picture.Series:
    values = {key: median(one[key] for one in readouts) for key in readouts[0]}
    return picture.Series(name, values, *STYLES[name])


def _draw_losses(axes: Axes, name: str, curves: torch.Tensor, smoothed: int) -> None:
    """curves [seeds, steps]."""
    color, line, marker = STYLES[name]
    smooth = torch.stack([part.mean(1) for part in curves.split(smoothed, 1)], 1)
    steps = torch.arange(smooth.shape[1]) * smoothed + smoothed / 2
    every = max(1, len(steps) // 6)
    style: dict[str, Any] = {"color": color, "marker": marker, "markevery": every, "markerfacecolor": "none"}
    axes.plot(steps, smooth.quantile(0.5, 0), line, label=name, **style)
    last = smooth[:, -1]
    place = steps[-1] * (1.03 + 0.02 * list(STYLES).index(name))
    axes.plot([place, place], [last.min(), last.max()], "-", color=color, linewidth=2)
