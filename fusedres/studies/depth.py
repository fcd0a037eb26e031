"""System E: does a deeper network train worse, and does it with skips too? 20, 56 and 1000 layers on scanned digits."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..gradients import picture
from ..stack import FusedResidualStack
from . import digits

WIDTH, BATCH, LEARNING_RATE = 32, 128, 1e-3
LAST = 50  # steps, over which a loss is averaged
SMOOTHED = 25  # steps, in the picture


@dataclass(frozen=True)
class Network:
    """A stem 64 -> WIDTH, `depth` layers of one width with or without skips, and a head WIDTH -> 10."""

    depth: int
    has_skips: bool

    def __str__(self) -> str:
        return f"{self.depth} layers, {'residual' if self.has_skips else 'plain'}"

    def build(self, seed: int) -> nn.Sequential:
        """He's initialisation, for ReLU. A residual branch counts 1 / depth: all of them together move as one does."""
        torch.manual_seed(seed)
        skip, scale = ("identity", 1 / self.depth) if self.has_skips else (None, 1.0)
        stack = FusedResidualStack([WIDTH] * (self.depth + 1), activation="relu", skip=skip, branch_scale=scale)
        model = nn.Sequential(nn.Linear(64, WIDTH), stack, nn.Linear(WIDTH, 10))
        for module in stack.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        return model


NETWORKS = (Network(20, False), Network(56, False), Network(20, True), Network(56, True), Network(1000, True))


@dataclass
class Training:
    """One network under one seed."""

    losses: list[float] = field(default_factory=list)  # of every step
    seconds: float = 0.0
    train_accuracy: float = 0.0
    held_out_accuracy: float = 0.0

    @property
    def last_loss(self) -> float:
        return mean(self.losses[-LAST:])


def run(out: Path, steps: int, seeds: int, device: torch.device) -> int:
    """Trains every network, prints a table, writes a picture and data into `out`; 0 if what is claimed holds, else 1.

    ImportError where a package that the study needs is missing.
    """
    missing = [name for name in ("matplotlib", "sklearn", "tqdm") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the study needs {', '.join(missing)}: pip install fusedres[demo]")
    from tqdm import tqdm

    if device.type == "cpu":
        torch.set_num_threads(1)  # so little work is done sooner than a second thread has come, where others work too
    out.mkdir(parents=True, exist_ok=True)
    print(f"Digits, width {WIDTH}, ReLU, batches of {BATCH}, Adam at {LEARNING_RATE}, {steps} steps, {seeds} seeds.")
    found: dict[Network, list[Training]] = {network: [] for network in NETWORKS}
    with tqdm(total=len(NETWORKS) * seeds * steps, desc="training", unit="step") as progress:
        for seed in range(seeds):
            for network in NETWORKS:
                progress.set_postfix_str(str(network))
                found[network].append(_train(network, steps, seed, device, progress))
    print(_table(found))
    claims = _claims(found)
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    _draw(found, out / "depth.png")
    runs = {str(network): [asdict(one) for one in trainings] for network, trainings in found.items()}
    facts = {"torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads(), "steps": steps}
    data = facts | {"width": WIDTH, "batch": BATCH, "claims": claims, "networks": runs}
    (out / "depth.json").write_text(json.dumps(data) + "\n")
    print("Written:", out / "depth.png", out / "depth.json")
    return 0 if all(claims.values()) else 1


def _train(network: Network, steps: int, seed: int, device: torch.device, progress: Any) -> Training:
    data = digits.load(seed, device)
    model = network.build(seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    training, begin, epoch = Training(), time.perf_counter(), 0
    losses: list[torch.Tensor] = []
    while len(losses) < steps:
        for rows in digits.batches(len(data.images), BATCH, 1000 * seed + epoch, device):
            if len(losses) == steps:
                break
            loss = F.cross_entropy(model(data.images[rows]), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            progress.update()
        epoch += 1
    training.losses = torch.stack(losses).tolist()
    training.seconds = time.perf_counter() - begin
    training.train_accuracy = _accuracy(model, data.images, data.labels)
    training.held_out_accuracy = _accuracy(model, data.held_out_images, data.held_out_labels)
    return training


def _accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(-1) == labels).double().mean().item()


def _table(found: dict[Network, list[Training]]) -> str:
    lines = [f"{'':22}{'loss':>9}{'least':>9}{'most':>9}{'train':>9}{'held out':>10}{'s / run':>9}"]
    for network, trainings in found.items():
        losses = [one.last_loss for one in trainings]
        rates = [mean(getattr(one, name) for one in trainings) for name in ("train_accuracy", "held_out_accuracy")]
        seconds = mean(one.seconds for one in trainings)
        numbers = "".join(f"{value:9.4f}" for value in (mean(losses), min(losses), max(losses)))
        lines.append(f"{network!s:22}{numbers}{rates[0]:9.1%}{rates[1]:10.1%}{seconds:9.1f}")
    return "\n".join([f"training loss over the last {LAST} steps, mean and range over seeds; digits right", *lines])


def _claims(found: dict[Network, list[Training]]) -> dict[str, bool]:
    """What the write-up says, and whether it was measured."""
    loss = {(one.depth, one.has_skips): mean(t.last_loss for t in trainings) for one, trainings in found.items()}
    chance = torch.log(torch.tensor(10.0)).item()
    return {
        "without skips 56 layers train worse than 20, on the training set": loss[56, False] > loss[20, False],
        "with skips 56 layers train no worse than without": loss[56, True] < loss[56, False],
        "skips narrow the gap between 56 and 20 layers": (
            loss[56, True] - loss[20, True] < loss[56, False] - loss[20, False]
        ),
        "1000 layers can be trained with skips, to below a tenth of chance": loss[1000, True] < 0.1 * chance,
    }


STYLES = {  # colour and line
    (20, False): (picture.SKY, "--"),
    (56, False): (picture.VERMILION, "--"),
    (20, True): (picture.SKY, "-"),
    (56, True): (picture.VERMILION, "-"),
    (1000, True): ("black", ":"),
}


def _draw(found: dict[Network, list[Training]], path: Path) -> None:
    figure = picture.new_figure(8, 5)
    axes = figure.subplots()
    for network, trainings in found.items():
        color, line = STYLES[network.depth, network.has_skips]
        curves = torch.tensor([one.losses for one in trainings])
        smooth = curves.unfold(1, min(SMOOTHED, curves.shape[1]), 1).mean(-1)
        steps = torch.arange(smooth.shape[1]) + curves.shape[1] - smooth.shape[1] + 1
        axes.plot(steps, smooth.mean(0), line, color=color, label=str(network))
        axes.fill_between(steps, smooth.amin(0), smooth.amax(0), color=color, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (cross-entropy)")
    axes.set_title(f"digits, width {WIDTH}, ReLU: mean over {SMOOTHED} steps; line and band: seeds' mean and range")
    axes.grid(axis="y", color="0.9")
    picture.save(figure, path)
