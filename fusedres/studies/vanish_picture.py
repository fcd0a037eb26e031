"""The pictures of `vanish`: mean |∂L/∂W| over depth, and what the gradient that reaches each layer is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..gradients import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {"with skips": (picture.BLUE, "-", "o"), "without": (picture.VERMILION, "--", "s")}
PARTS = {  # of the second picture: attribute, label, colour, line, marker
    "total": ("‖∂L/∂x‖, in all", "black", "-", ""),
    "branch": ("‖dz W‖, through the branch", picture.VERMILION, "--", "s"),
    "skip": ("‖λ g‖, through the skip", picture.SKY, "-.", "o"),
    "skips_alone": ("‖Πλ g‖, through skips alone", picture.BLUE, ":", ""),
    "weight": ("‖∂L/∂W‖", picture.GREY, "-", "^"),
}
FLOOR = 1e-14  # draws whose last GELU is saturated lie below, down to 1e-40 and 0


class Profile(NamedTuple):
    """Of one case: a caption, mean |∂L/∂W| [seed][layer] by network, and what the write-up printed at the ends."""

    caption: str
    values: Mapping[str, Sequence[Sequence[float]]]
    printed: Mapping[str, tuple[float, float]]


def profiles(cases: Mapping[str, Profile]) -> Figure:
    """A panel per case: the median over seeds, a band of their middle half, every seed as a thin line."""
    figure = picture.new_figure(12, 5.6)
    for axes, (title, case) in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases.items(), strict=True):
        for name, values in case.values.items():
            color, line, marker = STYLES[name]
            median = _draw_seeds(axes, values, color)
            axes.plot(range(len(median)), median, line, color=color, marker=marker, markerfacecolor="none", label=name)
            if name in case.printed:
                ends = (0, len(median) - 1)
                label = f"write-up, {name}"
                axes.plot(ends, case.printed[name], "*", color=color, ms=13, mec="black", mew=0.8, label=label)
        axes.set_title(
            f"{title}: {case.caption}\nmedian, middle half, and every one of {len(values)} seeds{_below(case)}"
        )
        axes.set_ylabel("mean |∂L/∂W|")
        _over_depth(axes, len(median))
        axes.set_ylim(bottom=max(FLOOR, axes.get_ylim()[0]))
    return figure


def halves(title: str, drawn: Mapping[bool, Sequence[Any]]) -> Figure:
    """With skips and without: medians over seeds of norms: the gradient's parts at every layer, and ‖∂L/∂W‖."""
    figure = picture.new_figure(12, 5.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (has_skips, draws) in zip(panels, drawn.items(), strict=True):
        for part, (label, color, line, marker) in PARTS.items():
            values = torch.tensor([getattr(draw, part) for draw in draws], dtype=torch.float64)
            median = values.quantile(0.5, 0)
            median[median <= 0] = torch.nan
            if part == "total":
                band = values.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64), 0).clamp(FLOOR)
                axes.fill_between(range(len(median)), *band, color="0.85", linewidth=0, label="‖∂L/∂x‖, middle half")
            if not median.isnan().all():
                width = 3 if part == "total" else 1.5
                axes.plot(median, line, color=color, marker=marker, markerfacecolor="none", lw=width, label=label)
        axes.set_title(f"{title}, {'with skips' if has_skips else 'without'}: medians over {len(draws)} seeds")
        _over_depth(axes, len(median))
    panels[0].set_ylabel("norm of a gradient, at a layer's input or of its weight")
    return figure


def _below(case: Profile) -> str:
    """How many draws lie below the scale, for a title: those whose last GELU is saturated."""
    count = sum(max(layers) < FLOOR for values in case.values.values() for layers in values)
    return f" ({count} below the scale)" if count else ""


def _draw_seeds(axes: Axes, values: Sequence[Sequence[float]], color: str) -> torch.Tensor:
    """Thin lines and a band in this colour; the median [layers]."""
    found = torch.tensor(values, dtype=torch.float64)
    low, median, high = found.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 0)
    for one in found:
        axes.plot(one.clamp(FLOOR / 100), color=color, linewidth=0.5, alpha=0.35)
    axes.fill_between(range(len(median)), low.clamp(FLOOR), high, color=color, alpha=0.18, linewidth=0)
    return median


def _over_depth(axes: Axes, layers: int) -> None:
    axes.set_yscale("log")
    axes.set_xticks(range(layers))
    axes.set_xlabel("layer, from the input to the loss")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
