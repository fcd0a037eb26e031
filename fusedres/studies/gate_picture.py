"""The picture of `gate`: loss, the two norms with the gate and without, and the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..gradients import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMS = {"gate": ("black", "-", "a learned, from 0"), "none": (picture.SKY, "-.", "a = 1")}
HALVES = {
    "branch": (picture.BLUE, "-", "through the branch, ‖∂L/∂x_in‖"),
    "skip": (picture.VERMILION, "--", "by the skip, ‖∂L/∂x_res‖"),
}


def draw(found: Mapping[str, Sequence[Any]], smoothed: int) -> Figure:
    """Lines are means over seeds of means over `smoothed` steps, bands reach over the seeds."""
    figure = picture.new_figure(12, 7)
    grid = figure.subplots(2, 2)
    loss, gate = grid[0]
    for form, (color, line, label) in FORMS.items():
        _curve(loss, [one.losses for one in found[form]], smoothed, color, line, label)
    loss.set_yscale("log")
    loss.set_ylabel("training loss (cross-entropy)")
    loss.set_title(f"loss: means over {smoothed} steps, mean and range of seeds")
    for form, trainings in found.items():
        for one in trainings:
            gate.plot(range(1, len(one.gate) + 1), one.gate, FORMS[form][1], color=FORMS[form][0])
    gate.set_ylabel("a, the branch's scale")
    gate.set_title("the gate, a line for each seed")
    for axes, form in zip(grid[1], FORMS, strict=True):
        _draw_norms(axes, form, found[form], smoothed)
    grid[1][1].sharey(grid[1][0])
    for axes in grid.flat:
        axes.set_xlabel("step")
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    return figure


def _draw_norms(axes: Axes, form: str, trainings: Sequence[Any], smoothed: int) -> None:
    for half, (color, line, label) in HALVES.items():
        _curve(axes, [getattr(one, half) for one in trainings], smoothed, color, line, label)
    crossings = [one.crossing for one in trainings if one.crossing is not None]
    for i, step in enumerate(crossings):
        axes.axvline(step, color=picture.GREY, linestyle=":", label="crossing of a seed, for good" if i == 0 else None)
    axes.set_yscale("log")
    axes.set_ylabel("‖∂L/∂x‖ at the block's input")
    axes.set_title(f"{FORMS[form][2]}: {len(crossings)} of {len(trainings)} seeds cross for good")


def _curve(axes: Axes, curves: Sequence[Sequence[float]], smoothed: int, color: str, line: str, label: str) -> None:
    """Zeros, which a log scale has not, are left out."""
    values = torch.tensor(curves, dtype=torch.float64)
    window = min(smoothed, values.shape[1])
    values = values.unfold(1, window, 1).mean(-1)
    values[values == 0] = torch.nan
    steps = torch.arange(values.shape[1]) + window
    axes.plot(steps, values.mean(0), line, color=color, label=label)
    axes.fill_between(steps, values.amin(0), values.amax(0), color=color, alpha=0.15, linewidth=0)
