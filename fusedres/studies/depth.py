"""System E: does a deeper network train worse, and with skips? 20 to 1000 layers, stochastic depth, layers removed."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, field
from math import log
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..stack import FusedResidualStack
from . import arguments, depth_picture, digits, lesion
from .report import Finding, Report, require

WIDTH, BATCH, LEARNING_RATE = 32, 128, 1e-3
LAST = 50  # steps, over which a loss is averaged
MOST_DROPPED = 0.5  # the last layer's drop_path with stochastic depth; the others' grow linearly up to it
DEEPEST = 1000  # of this depth as many are trained as --deep-seeds says
CHANCE = log(10)  # the loss of a guess among ten digits


@dataclass(frozen=True)
class Network:
    """A stem 64 -> WIDTH, `depth` layers of one width with or without skips, and a head WIDTH -> 10."""

    depth: int
    has_skips: bool
    drops: bool = False

    def __str__(self) -> str:
        kind = "residual" if self.has_skips else "plain"
        return f"{self.depth} layers, {kind}{', stochastic' if self.drops else ''}"

    def build(self, seed: int) -> nn.Sequential:
        """He's initialisation, for ReLU. A residual branch counts 1 / depth: all of them together move as one does."""
        torch.manual_seed(seed)
        skip, scale = ("identity", 1 / self.depth) if self.has_skips else (None, 1.0)
        drops = [MOST_DROPPED * (i + 1) / self.depth if self.drops else 0.0 for i in range(self.depth)]
        sizes = [WIDTH] * (self.depth + 1)
        stack = FusedResidualStack(sizes, activation="relu", skip=skip, branch_scale=scale, drop_path=drops)
        model = nn.Sequential(nn.Linear(64, WIDTH), stack, nn.Linear(WIDTH, 10))
        for module in stack.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        return model


NETWORKS = (
    *(Network(depth, has_skips) for has_skips in (False, True) for depth in (20, 56, 200, DEEPEST)),
    *(Network(depth, True, drops=True) for depth in (56, 200)),
)
LESIONS = (Network(20, False), Network(20, True), Network(56, True), Network(56, True, drops=True))


@dataclass
class Training:
    """One network under one seed."""

    losses: list[float] = field(default_factory=list)  # of every step
    seconds: float = 0.0
    whole_loss: float = 0.0  # of all training digits at the end, no layer dropped
    train_accuracy: float = 0.0
    held_out_accuracy: float = 0.0
    without_layer: list[float] = field(default_factory=list)  # whole_loss where this one layer is removed

    @property
    def last_loss(self) -> float:
        return mean(self.losses[-LAST:])


Trainings = dict[Network, list[Training]]


def options(parser: argparse.ArgumentParser) -> None:
    arguments.number(parser, "--steps", 600, "of each training")
    arguments.number(parser, "--deep-seeds", 1, f"trainings of each network of {DEEPEST} layers; --seeds at most")


def run(options: argparse.Namespace, device: torch.device) -> Report:
    """Trains every network under every seed, then removes layers. ImportError where a package is missing."""
    require("matplotlib", "sklearn", "tqdm")
    from tqdm import tqdm

    arguments.one_thread(device)
    steps = options.steps
    found: Trainings = {network: [] for network in NETWORKS}
    plan = [
        (seed, network)
        for place, seed in enumerate(arguments.seeds(options))
        for network in NETWORKS
        if network.depth < DEEPEST or place < options.deep_seeds
    ]
    with tqdm(total=sum(network.depth for _, network in plan) * steps, desc="training", unit="layer") as progress:
        for seed, network in plan:
            progress.set_postfix_str(str(network))
            found[network].append(_train(network, steps, seed, device, progress))
    deep_seeds = min(options.seeds, options.deep_seeds)
    setting = (
        f"Digits, width {WIDTH}, ReLU, residual branches times 1 / depth, batches of {BATCH}, Adam at {LEARNING_RATE}, "
        f"{steps} steps, {options.seeds} seeds, {deep_seeds} of {DEEPEST} layers."
    )
    networks = {str(network): [_rounded(asdict(one)) for one in found[network]] for network in NETWORKS}
    facts = arguments.facts(options, device, "steps", "deep_seeds") | {"width": WIDTH, "batch": BATCH}
    return Report(
        name="depth",
        question="Does a deeper network train worse, also on the training set, and does it with skips too?",
        table=f"{setting}\n{_table(found)}",
        findings=_claims(found) + _claims_of_layers(found),
        data=facts | {"networks": networks},
        figures={"": depth_picture.trainings(found, WIDTH), "lesion": depth_picture.lesions(found, LESIONS, CHANCE)},
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
        training.without_layer = lesion.losses(model, data.images, data.labels)
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
        numbers = "".join(f"{value:9.4f}" for value in (mean(losses), min(losses), max(losses), whole))
        lines.append(f"{network!s:34}{numbers}{rates[0]:9.1%}{rates[1]:10.1%}{seconds:9.1f}")
    for network in LESIONS:
        removed = sorted(loss for one in found[network] for loss in one.without_layer)
        middle, most = removed[len(removed) // 2], removed[-1]
        lines.append(f"{network!s:34}one layer removed: whole loss {middle:.3g} in the median, {most:.3g} at most")
    head = (
        f"training loss over the last {LAST} steps, mean and range over seeds; over all digits trained with, no layer"
    )
    return "\n".join([f"{head} dropped; digits right", *lines])


def _claims(found: Trainings) -> list[Finding]:
    """What the write-up says of depth, and whether it was measured."""
    loss = {(one.depth, one.has_skips): mean(t.last_loss for t in found[one]) for one in found if not one.drops}

    def said(*which: tuple[int, bool]) -> str:
        return ", ".join(
            f"{'residual' if skips else 'plain'} {depth}: {loss[depth, skips]:.3g}" for depth, skips in which
        )

    seconds = mean(one.seconds for one in found[Network(DEEPEST, True)])
    reached, failed = ((200, True), (DEEPEST, True)), ((200, False), (DEEPEST, False))
    gaps = [loss[56, has_skips] - loss[20, has_skips] for has_skips in (True, False)]
    return [
        Finding(
            "without skips 56 layers train worse than 20, on the training set",
            said((56, False), (20, False)),
            loss[56, False] > loss[20, False],
        ),
        Finding(
            "with skips 56 layers train no worse than without",
            said((56, True), (56, False)),
            loss[56, True] < loss[56, False],
        ),
        Finding(
            "skips narrow the gap between 56 and 20 layers",
            f"from {gaps[1]:.3g} to {gaps[0]:.3g}",
            gaps[0] < gaps[1],
        ),
        Finding(
            f"{DEEPEST} layers can be trained with skips, to below a tenth of chance",
            f"{said((DEEPEST, True))}; chance {CHANCE:.3g}; once: {DEEPEST} layers train in {seconds:.0f} s here",
            loss[DEEPEST, True] < 0.1 * CHANCE,
        ),
        Finding(
            "skips go far beyond the depth that plain networks reach",
            f"{said(*failed)}, which is chance where 2.3; {said(*reached)}",
            all(loss[one] > 0.9 * CHANCE for one in failed) and all(loss[one] < 0.1 * CHANCE for one in reached),
        ),
    ]


def _claims_of_layers(found: Trainings) -> list[Finding]:
    """What the write-up says of layers dropped in training, and removed afterwards."""
    stochastic = [network for network in found if network.drops]
    pairs = [
        f"{network.depth} layers {mean(t.whole_loss for t in found[network]):.3g} and "
        f"{mean(t.whole_loss for t in found[Network(network.depth, True)]):.3g}, held out "
        f"{mean(t.held_out_accuracy for t in found[network]):.1%} and "
        f"{mean(t.held_out_accuracy for t in found[Network(network.depth, True)]):.1%}"
        for network in stochastic
    ]
    trains = all(mean(t.whole_loss for t in found[network]) < 0.1 * CHANCE for network in stochastic)
    residual = [network for network in LESIONS if network.has_skips]
    plain = LESIONS[0]
    most = {network: max(max(t.without_layer) / t.whole_loss for t in found[network]) for network in residual}
    ruined = sorted(loss for t in found[plain] for loss in t.without_layer)
    whole = mean(t.whole_loss for t in found[plain])
    return [
        Finding(
            "layers can be dropped at random during training",
            f"loss with and without, no layer dropped then: {'; '.join(pairs)}",
            trains,
        ),
        Finding(
            "after training, removal of single layers hardly hurts a residual network",
            "; ".join(
                f"{network}: the worst layer multiplies the loss by {times:.2f}" for network, times in most.items()
            ),
            all(times < 2 for times in most.values()),
        ),
        Finding(
            "of a plain network it ruins what was learnt",
            f"{plain}: loss {whole:.3g} becomes {ruined[len(ruined) // 2]:.3g} in the median over layers",
            ruined[len(ruined) // 2] > max(10 * whole, 0.5 * CHANCE),
        ),
    ]


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        return [short(one) for one in value] if isinstance(value, list) else float(f"{value:.4g}")

    return {name: short(value) for name, value in values.items()}
