"""The picture of `gate`: loss, the two norms with the gate and without, and the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..gradients import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMS = {"gate": ("black", "-", "a learned, from 0"), "none": (picture.GREEN, "-.", "a = 1")}
HALVES = {
    "branch": (picture.VERMILION, "--", "through the branch, ‖∂L/∂x_in‖"),
    "skip": (picture.BLUE, "-", "by the skip, ‖∂L/∂x_res‖"),
}
ROWS = 4  # of seeds' numbers above one another, so that neighbours can be read


def draw(found: Mapping[str, Sequence[Any]], seeds: Sequence[int], smoothed: int) -> Figure:
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
        _draw_norms(axes, form, found[form], seeds, smoothed)
    grid[1][1].sharey(grid[1][0])
    for axes in grid.flat:
        axes.set_xlabel("step")
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    return figure


def _draw_norms(axes: Axes, form: str, trainings: Sequence[Any], seeds: Sequence[int], smoothed: int) -> None:
    for half, (color, line, label) in HALVES.items():
        _curve(axes, [getattr(one, half) for one in trainings], smoothed, color, line, label)
    crossings = sorted(
        (one.crossing, seed) for one, seed in zip(trainings, seeds, strict=True) if one.crossing is not None
    )
    for i, (step, seed) in enumerate(crossings):
        label = "crossing for good, and the number of its seed" if i == 0 else None
        axes.axvline(step, color=picture.GREY, linestyle=":", linewidth=1, label=label)
        height = 0.03 + 0.05 * (i % ROWS)
        box = {"facecolor": "white", "linewidth": 0, "pad": 0.8}
        place = axes.get_xaxis_transform()
        axes.text(step + 4, height, f"{seed}", transform=place, fontsize="small", bbox=box)
    never = [str(seed) for one, seed in zip(trainings, seeds, strict=True) if one.crossing is None]
    told = f"; not {', '.join(never)}" if never else ""
    axes.set_yscale("log")
    axes.set_ylabel("‖∂L/∂x‖ at the block's input")
    axes.set_title(f"{FORMS[form][2]}: {len(crossings)} of {len(trainings)} seeds cross for good{told}")


def _curve(axes: Axes, curves: Sequence[Sequence[float]], smoothed: int, color: str, line: str, label: str) -> None:
    """Zeros, which a log scale has not, are left out."""
    values = torch.tensor(curves, dtype=torch.float64)
    window = min(smoothed, values.shape[1])
    values = values.unfold(1, window, 1).mean(-1)
    values[values == 0] = torch.nan
    steps = torch.arange(values.shape[1]) + window
    axes.plot(steps, values.mean(0), line, color=color, label=label)
    axes.fill_between(steps, values.amin(0), values.amax(0), color=color, alpha=0.15, linewidth=0)
