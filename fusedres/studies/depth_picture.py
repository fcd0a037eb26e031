"""The pictures of `depth`: losses over steps, and the loss where a layer has been removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..gradients import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHED = 25  # steps
STYLES: dict[int, dict[str, Any]] = {  # by depth; deeper ones lie above, and thinner, so that none hides another
    20: {"color": picture.GREEN, "marker": "o", "linewidth": 1.5, "linestyle": "-"},
    56: {"color": picture.VERMILION, "marker": "s", "linewidth": 1.5, "linestyle": "--"},
    200: {"color": picture.BLUE, "marker": "^", "linewidth": 4, "linestyle": "-", "alpha": 0.6},
    1000: {"color": "black", "marker": "D", "linewidth": 1.5, "linestyle": (0, (3, 2))},
}
LINES = {"plain": "--", "residual": "-", "stochastic": ":"}
MARKERS = {"plain": "s", "residual": "o", "stochastic": "^"}
TITLES = {"stochastic": "residual, stochastic depth"}


def trainings(found: Mapping[Any, Sequence[Any]], baseline: Any, width: int, chance: float) -> Figure:
    """A panel per kind of network, the baseline in all: seeds' mean of smoothed losses, and their range."""
    figure = picture.new_figure(14, 5)
    kinds = dict.fromkeys(network.kind for network in found if network != baseline)
    panels = figure.subplots(1, len(kinds), sharey=True)
    for axes, kind in zip(panels, kinds, strict=True):
        style = {"color": picture.GREY, "linestyle": "-.", "label": "no layers: a linear classifier"}
        _draw_losses(axes, found[baseline], style)
        for i, (network, runs) in enumerate(found.items()):
            if network.kind == kind:
                label = f"{network.depth} layers"
                _draw_losses(axes, runs, STYLES[network.depth] | {"label": label, "markevery": (0.03 * (i % 4), 0.13)})
        axes.axhline(chance, color="black", linewidth=0.8, zorder=0)
        axes.annotate("chance", (0, chance), xytext=(3, 3), textcoords="offset points")
        axes.set_title(TITLES.get(kind, kind))
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    panels[0].set_ylabel(f"training loss (cross-entropy), mean of {SMOOTHED} steps")
    figure.suptitle(f"digits, width {width}, ReLU; line and band: seeds' mean and range")
    return figure


def lesions(found: Mapping[Any, Sequence[Any]], networks: Sequence[Any], chance: float) -> Figure:
    """The loss without each layer in turn, and for residual networks how many times the whole network's that is.

    Median over seeds and range, over the layer's place in the network.
    """
    figure = picture.new_figure(13, 5.4)
    figure.suptitle("one layer removed after training; line and band: seeds' median and range")
    left, right = figure.subplots(1, 2)
    for network in networks:
        losses = torch.tensor([one.without_layer for one in found[network]])
        whole = torch.tensor([[one.whole_loss] for one in found[network]])
        _draw_lesions(left, network, losses)
        if network.has_skips:
            _draw_lesions(right, network, losses / whole)
    left.axhline(chance, color="black", linewidth=0.8)
    left.annotate("chance", (1, chance), xytext=(0, -3), textcoords="offset points", ha="right", va="top")
    left.set_yscale("log")
    left.set_ylabel("loss on all digits trained with (cross-entropy)")
    right.axhline(1, color="black", linewidth=0.8)
    right.set_ylabel("that loss / the whole network's")
    for axes, what in ((left, "all networks"), (right, "residual networks alone")):
        axes.set_title(what)
        axes.set_xlabel("place of the removed layer, 0: the first, 1: the last")
        axes.grid(axis="y", color="0.9")
    return figure


def _draw_lesions(axes: Axes, network: Any, values: torch.Tensor) -> None:
    """values [seeds, layers]."""
    places = (torch.arange(network.depth) + 0.5) / network.depth
    color = STYLES[network.depth]["color"]
    style: dict[str, Any] = {"marker": MARKERS[network.kind], "markersize": 4, "markerfacecolor": "none"}
    every = max(1, network.depth // 20)
    axes.plot(
        places, values.quantile(0.5, 0), LINES[network.kind], color=color, markevery=every, label=str(network), **style
    )
    axes.fill_between(places, values.amin(0), values.amax(0), color=color, alpha=0.15, linewidth=0)


def _draw_losses(axes: Axes, runs: Sequence[Any], style: dict[str, Any]) -> None:
    curves = torch.tensor([one.losses for one in runs])
    smooth = curves.unfold(1, min(SMOOTHED, curves.shape[1]), 1).mean(-1)
    steps = torch.arange(smooth.shape[1]) + curves.shape[1] - smooth.shape[1] + 1
    axes.plot(steps, smooth.mean(0), markerfacecolor="none", **style)
    axes.fill_between(steps, smooth.amin(0), smooth.amax(0), color=style["color"], alpha=0.15, linewidth=0)
