"""The claims of `depth`: of networks by kind and number of layers, each judged by its worst seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from statistics import mean
from typing import TYPE_CHECKING

from . import reading
from .report import Finding

if TYPE_CHECKING:
    from .depth import Network, Training

CHANCE = log(10)  # the loss of a guess among ten digits
TRAINED = 0.1 * CHANCE  # is below
FURTHER = 0.75  # of a linear classifier's loss at most has what learns more
HARDLY, CLEARLY = 1.5, 2.0  # times the whole network's loss: what a layer's removal may do, what half of them must

Key = tuple[str, int]  # kind, number of layers


class Found:
    """The trainings by kind and number of layers."""

    def __init__(self, trainings: Mapping[Network, Sequence[Training]]) -> None:
        self.by_key = {(network.kind, network.depth): runs for network, runs in trainings.items()}
        self.depths = sorted({depth for _, depth in self.by_key if depth})

    def losses(self, *keys: Key) -> list[float]:
        return [run.last_loss for key in keys for run in self.by_key[key]]

    def least(self, *keys: Key) -> float:
        return reading.least(self.losses(*keys))

    def worst(self, *keys: Key) -> float:
        return reading.worst(self.losses(*keys))

    def learns(self, *keys: Key) -> bool:
        """Whether all are trained, in every seed, and further than no layers are in any after as many steps."""
        return all(self.worst(key) < TRAINED and self.worst(key) < FURTHER * self.linear(key) for key in keys)

    def linear(self, key: Key) -> float:
        """The least loss of no layers, a linear classifier, after as many steps."""
        steps = len(self.by_key[key][0].losses)
        return reading.least(run.loss_at(steps) for run in self.by_key["no layers", 0])

    def said(self, *keys: Key) -> str:
        return ", ".join(f"{kind} {depth}: {reading.spread(self.losses((kind, depth)))}" for kind, depth in keys)


def of_depth(trainings: Mapping[Network, Sequence[Training]]) -> list[Finding]:
    """What the write-up says of depth. Where one loss has to be below another, all seeds' ranges are apart."""
    found = Found(trainings)
    deepest = found.depths[-1]
    plain, residual = ([(kind, depth) for depth in found.depths] for kind in ("plain", "residual"))
    plain_20, plain_56, residual_20, residual_56 = (*plain[:2], *residual[:2])
    gap, plain_gap = (
        found.worst(residual_56) - found.least(residual_20),
        found.least(plain_56) - found.worst(plain_20),
    )
    runs = found.by_key["residual", deepest]
    losses = [loss for of in trainings.values() for run in of for loss in (*run.losses, run.whole_loss)]
    return [
        Finding(
            "without skips 56 layers train worse than 20, on the training set",
            found.said(plain_56, plain_20),
            found.least(plain_56) > found.worst(plain_20),
        ),
        Finding(
            "with skips 56 layers train no worse than without",
            found.said(residual_56, plain_56),
            found.learns(residual_56) and found.worst(residual_56) < found.least(plain_56),
        ),
        Finding(
            "skips narrow the gap between 56 and 20 layers",
            f"from {plain_gap:.3g} at least to {gap:.3g} at most",
            found.learns(residual_20, residual_56) and gap < plain_gap,
        ),
        Finding(
            f"{deepest} layers can be trained with skips, to below a tenth of chance",
            f"{found.said(residual[-1])} after {len(runs[0].losses)} steps; chance {CHANCE:.3g}; they train in "
            f"{mean(run.seconds for run in runs):.0f} s here",
            found.learns(residual[-1]),
        ),
        Finding(
            "skips go far beyond the depth that plain networks reach",
            f"{found.said(*plain[2:])}, which is chance where 2.3; {found.said(*residual[2:])}",
            found.least(*plain[2:]) > 0.9 * CHANCE and found.learns(*residual[2:]),
        ),
        Finding(
            "of this project: residual layers of every depth learn what no layers at all, a linear classifier, do not",
            f"no layers: {reading.spread(found.losses(('no layers', 0)))}, after {deepest} layers' steps "
            f"{found.linear(residual[-1]):.3g} at least; {found.said(*residual)}; holds below {FURTHER:.0%} of it",
            found.learns(*residual),
        ),
        reading.all_finite("losses of all steps", losses),
    ]


def of_layers(trainings: Mapping[Network, Sequence[Training]]) -> list[Finding]:
    """What the write-up says of layers dropped in training, and removed afterwards."""
    found = Found(trainings)
    stochastic = [("stochastic", depth) for depth in found.depths]
    pairs = (f"{key[1]} layers {_whole(found, key)}, {_whole(found, ('residual', key[1]))}" for key in stochastic)
    cut = [key for key, runs in found.by_key.items() if runs[0].without_layer and key[0] != "plain"]
    single = {key: [reading.worst(run.without_layer) / run.whole_loss for run in found.by_key[key]] for key in cut}
    half = {key: [reading.least(run.halved) / run.whole_loss for run in found.by_key[key]] for key in cut}
    plain = ("plain", found.depths[0])
    ruined = [loss for run in found.by_key[plain] for loss in run.without_layer]
    middle, whole = reading.quartiles(ruined)[1], reading.worst(run.whole_loss for run in found.by_key[plain])
    return [
        Finding(
            "layers can be dropped at random during training",
            f"loss with and without, no layer dropped then: {'; '.join(pairs)}",
            found.learns(*stochastic),
        ),
        Finding(
            "after training, removal of single layers hardly hurts a residual network",
            f"the worst layer multiplies the loss, {_times(single)}; holds below {HARDLY:g}, of trained networks",
            found.learns(*cut) and all(reading.worst(times) < HARDLY for times in single.values()),
        ),
        Finding(
            "of this project: removal of half of its layers does hurt it, so that they are in use",
            f"it multiplies the loss, {_times(half)}; holds above {CLEARLY:g}",
            all(reading.least(times) > CLEARLY for times in half.values()),
        ),
        Finding(
            "of a plain network the removal of a layer ruins what was learnt",
            f"{plain[1]} layers: loss {whole:.3g} at most becomes {middle:.3g} in the median over layers",
            found.learns(plain) and middle > max(10 * whole, 0.5 * CHANCE),
        ),
    ]


def _whole(found: Found, key: Key) -> str:
    runs = found.by_key[key]
    right = mean(run.held_out_accuracy for run in runs)
    return f"{mean(run.whole_loss for run in runs):.3g} (held out {right:.1%} right)"


def _times(values: Mapping[Key, Sequence[float]]) -> str:
    return ", ".join(f"{kind} {depth}: {reading.spread(times, '.2f')}" for (kind, depth), times in values.items())
