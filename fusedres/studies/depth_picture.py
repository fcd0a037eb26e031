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
COLORS = {20: picture.SKY, 56: picture.VERMILION, 200: picture.BLUE, 1000: "black"}
LINES = {"plain": "--", "residual": "-", "stochastic": ":"}
MARKERS = {20: "o", 56: "s", 200: "^", 1000: "D"}


def trainings(found: Mapping[Any, Sequence[Any]], width: int) -> Figure:
    """A panel per kind of network: the mean over seeds of the smoothed loss, and their range as a band."""
    figure = picture.new_figure(14, 5)
    kinds = dict.fromkeys(map(_kind, found))
    panels = figure.subplots(1, len(kinds), sharey=True)
    for axes, kind in zip(panels, kinds, strict=True):
        for network, runs in found.items():
            if _kind(network) == kind:
                _draw_losses(axes, network, torch.tensor([one.losses for one in runs]))
        axes.set_title({"stochastic": "residual, stochastic depth"}.get(kind, kind))
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.grid(axis="y", color="0.9")
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
    kind = _kind(network)
    color, marker = COLORS[network.depth], "s" if kind == "plain" else "o"
    if kind == "stochastic":
        color, marker = picture.GREY, "^"
    style: dict[str, Any] = {"marker": marker, "markersize": 4, "markerfacecolor": "none", "label": str(network)}
    axes.plot(places, values.quantile(0.5, 0), LINES[kind], color=color, **style)
    axes.fill_between(places, values.amin(0), values.amax(0), color=color, alpha=0.15, linewidth=0)


def _kind(network: Any) -> str:
    return "stochastic" if network.drops else "residual" if network.has_skips else "plain"


def _draw_losses(axes: Axes, network: Any, curves: torch.Tensor) -> None:
    smooth = curves.unfold(1, min(SMOOTHED, curves.shape[1]), 1).mean(-1)
    steps = torch.arange(smooth.shape[1]) + curves.shape[1] - smooth.shape[1] + 1
    color, marker = COLORS[network.depth], MARKERS[network.depth]
    every = max(1, len(steps) // 8)
    style: dict[str, Any] = {"color": color, "marker": marker, "markevery": every, "markerfacecolor": "none"}
    axes.plot(steps, smooth.mean(0), "-", **style, label=f"{network.depth} layers")
    axes.fill_between(steps, smooth.amin(0), smooth.amax(0), color=color, alpha=0.15, linewidth=0)
