"""Pictures of gradients over depth: a log scale, colours told apart by everyone, no display needed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette. Line styles and markers differ besides, for print without colour.
BLUE, SKY, VERMILION, GREY = "#0072B2", "#56B4E9", "#D55E00", "#555555"
GREEN, ORANGE = "#009E73", "#E69F00"
INCHES_PER_LABEL = 2.6  # of a legend
MOST_LABELS = 26  # more names than this cannot be read side by side


class Series(NamedTuple):
    """One quantity over the names of weights; an empty line draws markers alone."""

    label: str
    values: Mapping[str, float]
    color: str
    line: str
    marker: str


class Edge(NamedTuple):
    """Where values stand that have no place on a log scale."""

    label: str
    height: float
    marker: str
    holds: Callable[[float], bool]


ZERO = Edge("exactly 0 (at the foot)", 0.03, "v", lambda value: value == 0)
NOT_FINITE = Edge("not finite (on top)", 0.97, "^", lambda value: not math.isfinite(value))


def coincidence(
    fused: Mapping[str, float],
    eager: Mapping[str, float],
    suffix: str = "",
    color: str = BLUE,
    line: str = "-",
    marker: str = "o",
) -> list[Series]:
    """Eager as a line and fused as open markers on it: where they are equal, every marker sits on the line."""
    return [
        Series(f"eager{suffix}", eager, color, line, "."),
        Series(f"fused{suffix}", fused, color, "", marker),
    ]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches, outside pyplot; ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install fusedres[demo]") from error
    return Figure((width, height), layout="constrained")


def draw_gradients(axes: Axes, series: Sequence[Series]) -> None:
    """Every series over the names of the weights. A log scale has no 0: zeros stand at the foot, infinities on top."""
    longest_first = sorted(series, key=lambda one: -len(one.values))
    places = {name: i for i, name in enumerate(dict.fromkeys(name for one in longest_first for name in one.values))}

    axes.set_yscale("log")
    axes.margins(y=0.15)
    for one in series:
        _draw_series(axes, one, places)
    for edge in (ZERO, NOT_FINITE):
        _mark_edge(axes, edge, series, places)

    step = math.ceil(len(places) / MOST_LABELS)
    labels = [name.removesuffix(".weight") for name in places][::step]
    axes.set_xticks(range(0, len(places), step), labels, rotation=90, fontsize="small")
    axes.set_xlabel("weight, in the order of the model")
    axes.set_ylabel("mean |∂L/∂W|")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def save(figure: Figure, path: str | PathLike[str]) -> None:
    """Writes the figure with one legend for all of its panels; the format follows the path's suffix."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = max(1, int(figure.get_figwidth() / INCHES_PER_LABEL))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=200)


def _draw_series(axes: Axes, one: Series, places: Mapping[str, int]) -> None:
    """A line joins weights of one kind only: `layers.0`, `layers.1`, … but not `layers.4` to `projections.0`."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, value in one.values.items():
        is_drawn = 0 < value < math.inf
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append((places[name], value if is_drawn else math.nan))
    size = 5 if one.marker == "." else 9
    for i, points in enumerate(kinds.values()):
        axes.plot(
            *zip(*_broken(points, len(kinds)), strict=True),
            color=one.color,
            linestyle=one.line,
            marker=one.marker,
            markersize=size,
            markerfacecolor=one.color if one.marker == "." else "none",
            label=one.label if i == 0 else None,
        )


def _broken(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """With a gap where more than `most` places lie between: a stem and a head have one name's form, and no line."""
    found = [points[0]]
    for before, here in pairwise(points):
        if here[0] - before[0] > most:
            found.append((before[0] + 0.5, math.nan))
        found.append(here)
    return found


def _mark_edge(axes: Axes, edge: Edge, series: Sequence[Series], places: Mapping[str, int]) -> None:
    """Marks in the colour of their series, at a height that is a fraction of the panel, whatever the scale beside."""
    is_used = False
    for one in series:
        found = [places[name] for name, value in one.values.items() if edge.holds(value)]
        heights = [edge.height] * len(found)
        axes.plot(found, heights, edge.marker, color=one.color, transform=axes.get_xaxis_transform())
        is_used = is_used or bool(found)
    if is_used:
        axes.plot([], [], edge.marker, color=GREY, label=edge.label)
