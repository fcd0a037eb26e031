"""System D: shortcuts where sizes differ: none, identity, projection and dense, at equal parameters and steps."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gradients import GradientComparison, compare_gradients, gradient_profile
from ..modules import FusedResidualLinear
from ..reference import ProjectionStack
from ..stack import FusedResidualStack
from . import arguments, reading, shortcut_picture, values
from .report import Finding, Report, require

SIZES = (128, 64, 32, 16, 8, 1)
SHORTCUTS = ("none", "projection", "dense", "none, even", "identity")  # even: hidden layers of one width
SKIPS = {"none": None, "none, even": None, "identity": "auto", "projection": "projection"}
ROWS, BATCH, HELD_OUT, LEARNING_RATE = 10, 256, 4096, 1e-3
LAST, SMOOTHED = 50, 10  # steps, over which a loss is averaged: at the end, and in the picture and the data


@dataclass
class Found:
    """One shortcut under one seed."""

    mean_abs: dict[str, float]  # |∂L/∂W| at the start, by weight
    losses: list[float] = field(default_factory=list)  # of every step
    held_out: float = 0.0  # the loss at the end, on fresh samples

    @property
    def last_loss(self) -> float:
        return mean(self.losses[-LAST:])

    def to_dict(self) -> dict[str, Any]:
        """Losses as means of SMOOTHED steps each."""
        parts = torch.tensor(self.losses).split(SMOOTHED)
        losses = [float(f"{part.mean():.4g}") for part in parts]
        return {"mean_abs": _short(self.mean_abs), "losses": losses, "held_out": float(f"{self.held_out:.4g}")}


def options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(seeds=5)
    sizes = " ".join(map(str, SIZES))
    parser.add_argument(
        "--sizes",
        metavar="N",
        type=values.Widths(most=4096),
        nargs="+",
        action=values.Joined,
        fewest=3,
        what="an input, a hidden layer and an output",
        default=list(SIZES),
        help=f"d₀ … d_L, by spaces or commas [{sizes}]",
    )
    arguments.number(parser, "--steps", 1500, "of each training")


def run(options: argparse.Namespace, device: torch.device) -> Report:
    """Readouts at the write-up's sizes and on equal budgets, then trainings. ImportError where a package is missing."""
    require("matplotlib", "tqdm")
    from tqdm import tqdm

    arguments.one_thread(device)
    sizes, seeds = tuple(options.sizes), arguments.seeds(options)
    budget = count(build("projection", sizes, 0))
    fitted = {shortcut: fit(shortcut, sizes, budget) for shortcut in SHORTCUTS}
    as_written: dict[str, list[dict[str, float]]] = {"none": [], "projection": []}
    found: dict[str, list[Found]] = {shortcut: [] for shortcut in SHORTCUTS}
    with tqdm(total=len(seeds) * len(SHORTCUTS) * options.steps, desc="shortcut", unit="step") as progress:
        for seed in seeds:
            for shortcut, readouts in as_written.items():
                readouts.append(_readout(build(shortcut, sizes, seed, "same").to(device), seed, sizes[0]))
            for shortcut in SHORTCUTS:
                progress.set_postfix_str(shortcut)
                model = build(shortcut, fitted[shortcut], seed).to(device)
                one = Found(_readout(model, seed, sizes[0]))
                _train(model, one, options.steps, seed, sizes, progress)
                found[shortcut].append(one)
    counts = {shortcut: count(build(shortcut, of, 0)) for shortcut, of in fitted.items()}
    twins = _twins(sizes, options.seed, device)
    apart = twins.largest_relative_difference
    facts = arguments.facts(options, device, "sizes", "steps") | {"rows": ROWS, "batch": BATCH, "budget": budget}
    measured = {
        "widths": fitted,
        "parameters": counts,
        "fused_and_eager_differ_by": apart,
        "as_written": {name: [_short(one) for one in readouts] for name, readouts in as_written.items()},
        "equal_budgets": {name: [one.to_dict() for one in runs] for name, runs in found.items()},
    }
    return Report(
        name="shortcut",
        question="What does a shortcut do where sizes differ: nothing, a projection, or the input kept beside?",
        table="\n".join([*_readouts(as_written, apart), "", *_budgets(found, fitted, counts, options)]),
        findings=[
            *_claims(as_written, found, sizes),
            reading.agreement({"with projections": twins}),
            _all_finite(as_written, found),
        ],
        data=facts | measured,
        figures={"": shortcut_picture.draw(as_written, found, SMOOTHED)},
    )


# ------------------------------------------------------------------------------------------------ networks


def build(shortcut: str, sizes: Sequence[int], seed: int, last_activation: str = "none") -> nn.Module:
    """A network d₀ -> d_L with GELU, after the last layer if last_activation says "same".

    none, identity (where neighbours are equal) and projection are stacks of these sizes. dense: every layer but the
    last gives [x, φ(z)], with as many new features as sizes say, and the next is as wide as both together.
    """
    torch.manual_seed(seed)
    if shortcut != "dense":
        return FusedResidualStack(sizes, skip=SKIPS[shortcut], last_activation=last_activation)
    layers, width, last = [], sizes[0], "none" if last_activation == "none" else "gelu"
    for new in sizes[1:-1]:
        layers.append(FusedResidualLinear(width, new, skip="concat"))
        width += new
    return nn.Sequential(*layers, FusedResidualLinear(width, sizes[-1], skip=None, activation=last))


def count(model: nn.Module) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def skips_taken(model: nn.Module) -> str:
    """How many layers take the shortcut, as a sentence."""
    taken = [one.resolved_skip != "none" for one in model.modules() if hasattr(one, "resolved_skip")]
    return f"{sum(taken)} of {len(taken)} layers take it"


def fit(shortcut: str, sizes: Sequence[int], budget: int) -> list[int]:
    """Sizes with the same ends, hidden ones scaled alike, or all the same where even, that come nearest to the budget.

    Counted in closed form: K N + N of every Linear.
    """

    def candidate(step: int) -> list[int]:
        hidden = (
            [step] * (len(sizes) - 2)
            if shortcut in ("identity", "none, even")
            else [round(one * step / 64) for one in sizes[1:-1]]
        )
        return [sizes[0], *(max(1, one) for one in hidden), sizes[-1]]

    def parameters(of: Sequence[int]) -> int:
        if shortcut == "dense":
            widths = [sum(of[: i + 1]) for i in range(len(of) - 1)]
            return sum((K + 1) * N for K, N in zip(widths, of[1:], strict=True))
        projected = [K != N and shortcut == "projection" for K, N in pairwise(of)]
        return sum(
            (K + 1) * N * (1 + is_projected) for (K, N), is_projected in zip(pairwise(of), projected, strict=True)
        )

    return min((candidate(step) for step in range(1, 1025)), key=lambda of: abs(parameters(of) - budget))


# ------------------------------------------------------------------------------------------------ measured


def _readout(model: nn.Module, seed: int, width: int) -> dict[str, float]:
    """mean |∂L/∂W| by weight for a batch of standard normals, MSE against zeros."""
    x = _normals(ROWS, width, seed + 1).to(next(model.parameters()).device)
    return gradient_profile(model, x).mean_abs


def _normals(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def teacher(x: Tensor, seed: int) -> Tensor:
    """The function to learn, [n, K] -> [n, 1]: sin(2 u·x) + v·x, with u and v drawn of length 1."""
    u, v = F.normalize(_normals(2, x.shape[1], 10_000 + seed).to(x.device))
    return (torch.sin(2 * x @ u) + x @ v)[:, None]


def _train(model: nn.Module, found: Found, steps: int, seed: int, sizes: Sequence[int], progress: Any) -> None:
    """Adam on fresh standard normals at every step, the same for every shortcut: nothing can be learnt by heart."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(20_000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    losses = []
    for _ in range(steps):
        x = torch.randn(BATCH, sizes[0], generator=generator).to(device)
        loss = _loss(model, x, seed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        progress.update()
    found.losses = torch.stack(losses).tolist()
    with torch.no_grad():
        found.held_out = _loss(model, _normals(HELD_OUT, sizes[0], 30_000 + seed).to(device), seed).item()


def _loss(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    y = model(x)
    return F.mse_loss(y, teacher(x, seed).expand_as(y))


def _twins(sizes: Sequence[int], seed: int, device: torch.device) -> GradientComparison:
    """Fused and the write-up's network by eager, with projections."""
    torch.manual_seed(seed)
    fused = FusedResidualStack(sizes, skip="projection").to(device)
    eager = ProjectionStack(sizes).to(device)
    eager.load_state_dict(fused.state_dict())
    return compare_gradients(fused, eager, _normals(ROWS, sizes[0], seed + 1).to(device))


# ------------------------------------------------------------------------------------------------ claims and output


def _claims(
    as_written: Mapping[str, list[dict[str, float]]], found: Mapping[str, list[Found]], sizes: Sequence[int]
) -> list[Finding]:
    """What the write-up says, which trained nothing."""
    pairs = list(zip(as_written["projection"], as_written["none"], strict=True))
    gains = [_over(_ends(a)[0], _ends(b)[0]) for a, b in pairs]
    spreads = [[_over(_ends(one)[1], _ends(one)[0]) for one in pair] for pair in pairs]
    projections = [name for name in pairs[0][0] if name.startswith("projections")]
    least = reading.least(a[name] for name in projections for a, _ in pairs) if projections else 0.0
    differ = sum(K != N for K, N in pairwise(sizes))
    taken = {shortcut: skips_taken(build(shortcut, sizes, 0)) for shortcut in ("identity", "projection")}
    dense = build("dense", sizes, 0)
    wide = [one.in_features for one in dense.modules() if isinstance(one, FusedResidualLinear)]
    firsts = {name: median(_ends(one.mean_abs)[0] for one in runs) for name, runs in found.items()}
    return [
        Finding(
            "where sizes differ and shortcuts are on, a learned Linear projects the skip",
            f"{differ} of {len(sizes) - 1} layers differ; identity: {taken['identity']}; projection: "
            f"{taken['projection']}, {len(projections)} by a Linear",
            len(projections) == differ and taken["projection"].startswith(f"{len(sizes) - 1} of"),
        ),
        Finding(
            "with shortcuts more gradient reaches the first layer's weight than without",
            f"{reading.spread(gains)} times as much over {len(gains)} seeds; the least of a projection's "
            f"weight: {least:.1e}",
            reading.least(gains) > 1 and least > 0,
        ),
        Finding(
            "with shortcuts the layers' gradients lie closer together",
            f"last layer's over first layer's mean |∂L/∂W|, medians: {median(a for a, _ in spreads):.3g} with, "
            f"{median(b for _, b in spreads):.3g} without",
            median(a for a, _ in spreads) < median(b for _, b in spreads),
        ),
        Finding(
            "by concatenation, [x, φ(z)], the next layer is as wide as both together, and gradient comes through too",
            f"inputs of the layers: {', '.join(map(str, wide))}; first layer, on equal budgets: {firsts['dense']:.1e} "
            f"against {firsts['none']:.1e} with none",
            wide == [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)] and firsts["dense"] > firsts["none"],
        ),
    ]


def _all_finite(as_written: Mapping[str, list[dict[str, float]]], found: Mapping[str, Sequence[Found]]) -> Finding:
    runs = [one for of in found.values() for one in of]
    readouts = [*(one for of in as_written.values() for one in of), *(one.mean_abs for one in runs)]
    gradients = [value for one in readouts for value in one.values()]
    return reading.all_finite("all gradients and losses", gradients + [loss for one in runs for loss in one.losses])


def _ends(readout: Mapping[str, float]) -> tuple[float, float]:
    """Of the first and the last layer's weight; projections come after."""
    layers = [value for name, value in readout.items() if not name.startswith("projections")]
    return layers[0], layers[-1]


def _over(a: float, b: float) -> float:
    """a / b, where no gradient at all may arrive."""
    return a / b if b else inf


def _readouts(as_written: Mapping[str, list[dict[str, float]]], apart: float) -> list[str]:
    lines = [f"mean |∂L/∂W| as written, {ROWS} rows: median over seeds", f"{'':24}{'with':>10}{'without':>10}"]
    for name in as_written["projection"][0]:
        cells = [
            f"{median(one[name] for one in readouts):10.1e}" if name in readouts[0] else f"{'-':>10}"
            for readouts in (as_written["projection"], as_written["none"])
        ]
        lines.append(f"{name:24}{''.join(cells)}")
    return [*lines, f"fused and eager differ by {apart:.1g} of a gradient's largest"]


def _budgets(
    found: Mapping[str, list[Found]],
    fitted: Mapping[str, Sequence[int]],
    counts: Mapping[str, int],
    options: argparse.Namespace,
) -> list[str]:
    lines = [
        f"equal budgets: {options.steps} steps of Adam at {LEARNING_RATE}, batches of {BATCH} fresh normals x, "
        f"to learn sin(2 u·x) + v·x; {options.seeds} seeds",
        f"{'':12}{'widths':28}{'parameters':>11}{'first |∂L/∂W|':>15}{'training':>10}"
        f"{'held out, median and range':>32}",
    ]
    for shortcut, runs in found.items():
        held = [one.held_out for one in runs]
        first = median(_ends(one.mean_abs)[0] for one in runs)
        training = median(one.last_loss for one in runs)
        widths = " ".join(map(str, fitted[shortcut]))
        spread = f"{median(held):.4f}  ({min(held):.4f} … {max(held):.4f})"
        lines.append(f"{shortcut:12}{widths:28}{counts[shortcut]:11}{first:15.1e}{training:10.4f}{spread:>32}")
    for shortcut, plain in (("projection", "none"), ("dense", "none"), ("identity", "none, even")):
        own, other = ([one.held_out for one in found[name]] for name in (shortcut, plain))
        overlap = "ranges overlap" if max(own) >= min(other) and max(other) >= min(own) else "ranges are apart"
        lines.append(f"{shortcut} ends at {median(own) / median(other):.2f} times the loss of {plain}; {overlap}")
    return [*lines, "The write-up trained nothing, so it claims nothing of these losses. A guess of 0 has loss 1.5."]


def _short(readout: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in readout.items()}
