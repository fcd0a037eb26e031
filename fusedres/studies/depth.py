"""System E: does a deeper network train worse, and with skips? 20 to 1000 layers, stochastic depth, layers removed.

Of the write-up's system are left out: its linear layer, y = x + (x Wᵀ + b), for ours have ReLU; normalisation in the
block; and projections between stages, for all layers are of one width. Plain and residual networks have the same draws
but differ in more than the skip: a residual branch counts 1 / depth, a plain one 1. No start was found from which both
train where all count 1: from He's, residual networks of 20 layers come to 0.37 in 600 steps, of 56 to 7e6, of 200 to
NaN; from PyTorch's own start residual ones of 20 layers to 0.0016, of 56 to 0.69, of 200 to 5e12, and plain ones of 20
layers to 1.25, of 56 to chance. All are held against no layers at all, which is a linear classifier.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..stack import FusedResidualStack
from . import arguments, depth_claims, depth_picture, digits, lesion, reading
from .depth_claims import CHANCE
from .report import Report, require

WIDTH, BATCH, LEARNING_RATE = 32, 128, 1e-3
LAST = 50  # steps, over which a loss is averaged
MOST_DROPPED = 0.5  # the last layer's drop_path with stochastic depth; the others' grow linearly up to it
DEPTHS = (20, 56, 200, 1000)
DEEPEST = DEPTHS[-1]  # of this depth as many are trained, and so long, as --deep-seeds and --deep-steps say


@dataclass(frozen=True)
class Network:
    """A stem 64 -> WIDTH, `depth` layers of one width with or without skips, and a head WIDTH -> 10; depth 0: none."""

    depth: int
    has_skips: bool
    drops: bool = False

    def __str__(self) -> str:
        if self.depth == 0:
            return self.kind
        return f"{self.depth} layers, {'residual, ' if self.drops else ''}{self.kind}"

    @property
    def kind(self) -> str:
        if self.depth == 0:
            return "no layers"
        return "stochastic" if self.drops else "residual" if self.has_skips else "plain"

    def build(self, seed: int) -> nn.Sequential:
        """He's initialisation, for ReLU. A residual branch counts 1 / depth: all of them together move as one does."""
        torch.manual_seed(seed)
        stack = self._stack() if self.depth else nn.Identity()
        model = nn.Sequential(nn.Linear(64, WIDTH), stack, nn.Linear(WIDTH, 10))
        for module in stack.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        return model

    def _stack(self) -> FusedResidualStack:
        skip, scale = ("identity", 1 / self.depth) if self.has_skips else (None, 1.0)
        drops = [MOST_DROPPED * (i + 1) / self.depth if self.drops else 0.0 for i in range(self.depth)]
        sizes = [WIDTH] * (self.depth + 1)
        return FusedResidualStack(sizes, activation="relu", skip=skip, branch_scale=scale, drop_path=drops)


NO_LAYERS = Network(0, False)
PLAIN, RESIDUAL, STOCHASTIC = (
    tuple(Network(depth, *kind) for depth in DEPTHS) for kind in ((False,), (True,), (True, True))
)
NETWORKS = (NO_LAYERS, *PLAIN, *RESIDUAL, *STOCHASTIC)
LESIONS = tuple(one for one in NETWORKS if 0 < one.depth < (DEEPEST if one.has_skips else 56))


@dataclass
class Training:
    """One network under one seed."""

    losses: list[float] = field(default_factory=list)  # of every step
    seconds: float = 0.0
    whole_loss: float = 0.0  # of all training digits at the end, no layer dropped
    train_accuracy: float = 0.0
    held_out_accuracy: float = 0.0
    without_layer: list[float] = field(default_factory=list)  # whole_loss where this one layer is removed
    halved: list[float] = field(default_factory=list)  # and where every second one is, from the first or second on

    @property
    def last_loss(self) -> float:
        return self.loss_at(len(self.losses))

    def loss_at(self, step: int) -> float:
        """Over the LAST steps up to this one, or as many as there are."""
        return mean(self.losses[:step][-LAST:])


Trainings = dict[Network, list[Training]]


def options(parser: argparse.ArgumentParser) -> None:
    arguments.number(parser, "--steps", 600, "of each training")
    arguments.number(parser, "--deep-seeds", 1, f"trainings of each network of {DEEPEST} layers; --seeds at most")
    arguments.number(parser, "--deep-steps", 400, "of each of these; --steps at most")


def run(options: argparse.Namespace, device: torch.device) -> Report:
    """Trains every network under every seed, then removes layers. ImportError where a package is missing."""
    require("matplotlib", "sklearn", "tqdm")
    from tqdm import tqdm

    arguments.one_thread(device)
    deep_steps = min(options.steps, options.deep_steps)
    found: Trainings = {network: [] for network in NETWORKS}
    plan = [
        (seed, network, deep_steps if network.depth == DEEPEST else options.steps)
        for place, seed in enumerate(arguments.seeds(options))
        for network in NETWORKS
        if network.depth < DEEPEST or place < options.deep_seeds
    ]
    with tqdm(total=sum(one.depth * steps for _, one, steps in plan), desc="training", unit="layer") as progress:
        for seed, network, steps in plan:
            progress.set_postfix_str(str(network))
            found[network].append(_train(network, steps, seed, device, progress))
    deep_seeds = min(options.seeds, options.deep_seeds)
    setting = (
        f"Digits, width {WIDTH}, ReLU, residual branches times 1 / depth, batches of {BATCH}, Adam at {LEARNING_RATE}, "
        f"{options.steps} steps, {options.seeds} seeds; of {DEEPEST} layers {deep_steps} steps, {deep_seeds} seeds."
    )
    networks = {str(network): [_rounded(asdict(one)) for one in found[network]] for network in NETWORKS}
    facts = arguments.facts(options, device, "steps", "deep_seeds", "deep_steps") | {"width": WIDTH, "batch": BATCH}
    return Report(
        name="depth",
        question="Does a deeper network train worse, also on the training set, and does it with skips too?",
        table=f"{setting}\n{_table(found)}",
        findings=depth_claims.of_depth(found) + depth_claims.of_layers(found),
        data=facts | {"networks": networks},
        figures={
            "": depth_picture.trainings(found, NO_LAYERS, WIDTH, CHANCE),
            "lesion": depth_picture.lesions(found, LESIONS, CHANCE),
        },
    )


def _train(network: Network, steps: int, seed: int, device: torch.device, progress: Any) -> Training:
    data = digits.load(seed, device)
    model = network.build(seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    training, begin, epoch = Training(), time.perf_counter(), 0
    losses: list[Tensor] = []
    while len(losses) < steps:
        for rows in digits.batches(len(data.images), BATCH, 1000 * seed + epoch, device):
            if len(losses) == steps:
                break
            loss = F.cross_entropy(model(data.images[rows]), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            progress.update(network.depth)
        epoch += 1
    training.losses = torch.stack(losses).tolist()
    training.seconds = time.perf_counter() - begin
    model.eval()
    training.whole_loss = lesion.loss(model, data.images, data.labels)
    training.train_accuracy = _accuracy(model, data.images, data.labels)
    training.held_out_accuracy = _accuracy(model, data.held_out_images, data.held_out_labels)
    if network in LESIONS:
        lesions = lesion.Lesions(model)
        training.without_layer = lesions.losses(data.images, data.labels)
        training.halved = lesions.halved(data.images, data.labels)
    return training


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(-1) == labels).double().mean().item()


def _table(found: Trainings) -> str:
    lines = [f"{'':34}{'loss':>9}{'least':>9}{'most':>9}{'whole':>9}{'train':>9}{'held out':>10}{'s / run':>9}"]
    for network, trainings in found.items():
        losses = [one.last_loss for one in trainings]
        whole = mean(one.whole_loss for one in trainings)
        rates = [mean(getattr(one, name) for one in trainings) for name in ("train_accuracy", "held_out_accuracy")]
        seconds = mean(one.seconds for one in trainings)
        numbers = "".join(
            f"{value:9.4f}" for value in (mean(losses), reading.least(losses), reading.worst(losses), whole)
        )
        lines.append(f"{network!s:34}{numbers}{rates[0]:9.1%}{rates[1]:10.1%}{seconds:9.1f}")
    for network in LESIONS:
        removed = [loss for one in found[network] for loss in one.without_layer]
        middle, most = reading.quartiles(removed)[1], reading.worst(removed)
        half = reading.spread(loss for one in found[network] for loss in one.halved)
        lines.append(
            f"{network!s:34}one layer removed: whole loss {middle:.3g} in the median, {most:.3g} at most; half: {half}"
        )
    head = (
        f"training loss over the last {LAST} steps, mean and range over seeds; over all digits trained with, no layer"
    )
    return "\n".join([f"{head} dropped; digits right", *lines])


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        return [short(one) for one in value] if isinstance(value, list) else float(f"{value:.4g}")

    return {name: short(value) for name, value in values.items()}
