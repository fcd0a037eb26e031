"""System C: λ on the skip: the gradient of a block with ReLU after the addition, and Πλ over depth.

The write-up's recursion is x_{l+1} = λ x_l + F(x_l). It is judged as it stands, a = 1, and in a form of this project's,
x_{l+1} = λ x_l + a F(x_l) with a = 1 / depth, where all branches together count as one does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import FusedResidualLinear
from . import arguments, digits, reading, skip_scale_picture
from .report import Finding, Report, require

SCALES = (0.5, 0.9, 1.0, 1.1, 2.0)  # λ
DEEPEST = 100  # layers: 2^±100 times a gradient is still a number of fp32
ROWS = 256  # digits, of which the loss is
ROUNDING = 1e-5  # relative: a thousand roundings of fp32, some one per layer add up
NEAR = 0.1  # of Πλ: what the whole gradient may differ where branches are small
ALONE = 2.0  # times as large or as small, at most, is what was left alone
BELOW, ABOVE = [scale for scale in SCALES if scale < 1], [scale for scale in SCALES if scale > 1]
CLAIMS = {"below 1 it vanishes with depth": BELOW, "above 1 it explodes": ABOVE, "at 1 it is left alone": [1.0]}
WHOLE, SMALL = "1", "1/depth"  # branch scales: the write-up's, and this project's


class Block(nn.Module):
    """h = ReLU(F₁(x)), y = ReLU(F₂(h) + x): x [..., width] -> [..., width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = FusedResidualLinear(width, activation="relu", skip=None)
        self.second = FusedResidualLinear(width, activation="relu", order="post")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), x)

    def branch(self, x: Tensor) -> Tensor:
        """F(x) = F₂(ReLU(F₁(x))) of one row x [width], in float64 and by eager PyTorch."""
        (w1, b1), (w2, b2) = (
            (one.weight.detach().double(), one.bias.detach().double()) for one in (self.first, self.second)
        )
        return F.linear(torch.relu(F.linear(x, w1, b1)), w2, b2)


@dataclass
class Carried:
    """What of ∂L/∂x_L arrives k = 0, 1, … layers before, under one seed."""

    coefficient: list[float]  # ⟨∂L/∂x_l, ∂L/∂x_L⟩ / ‖∂L/∂x_L‖²
    norm: list[float]  # ‖∂L/∂x_l‖ / ‖∂L/∂x_L‖


Fan = dict[float, dict[str, list[Carried]]]  # by λ, then by the name of a branch scale


def options(parser: argparse.ArgumentParser) -> None:
    arguments.number(parser, "--depth", 30, "layers of the recursion", least=2, most=DEEPEST)
    arguments.number(parser, "--width", 32, "features of a layer", most=512)
    arguments.number(parser, "--blocks", 4, "blocks with ReLU after the addition", most=100)


def run(options: argparse.Namespace, device: torch.device) -> Report:
    """The block's gradient against its equation, then every λ and branch scale. ImportError without a package."""
    require("matplotlib", "sklearn", "tqdm")
    from tqdm import tqdm

    arguments.one_thread(device)
    depth, width, seeds = options.depth, options.width, arguments.seeds(options)
    sizes = branch_scales(depth)
    fan: Fan = {scale: {name: [] for name in sizes} for scale in SCALES}
    errors: list[float] = []
    with tqdm(total=len(seeds) * (1 + len(SCALES) * len(sizes)), desc="lambda", unit="network") as progress:
        for seed in seeds:
            errors += equation_errors(options.blocks, width, seed, device)
            progress.update()
            for scale in SCALES:
                for name, branch_scale in sizes.items():
                    fan[scale][name].append(carried(scale, branch_scale, depth, width, seed, device))
                    progress.update()
    return Report(
        name="lambda",
        question="What does λ on the skip leave of a gradient over depth?",
        table=_table(fan, options),
        findings=[_equation(errors, options.blocks), *_claims(fan, depth)],
        data=_data(fan, errors, options, device),
        figures={"": _picture(fan, depth)},
    )


def branch_scales(depth: int) -> dict[str, float]:
    """a of x_{l+1} = λ x_l + a F(x_l), by name."""
    return {"0": 0.0, "0.1/depth": 0.1 / depth, SMALL: 1 / depth, "1/√depth": depth**-0.5, WHOLE: 1.0}


# ------------------------------------------------------------------------------------------------ measured


def carried(scale: float, branch_scale: float, depth: int, width: int, seed: int, device: torch.device) -> Carried:
    """Of x_{l+1} = λ x_l + a ReLU(x_l Wᵀ + b) between a stem and a head, under cross-entropy on digits."""
    torch.manual_seed(seed)
    layers = [
        FusedResidualLinear(width, activation="relu", skip_scale=scale, branch_scale=branch_scale) for _ in range(depth)
    ]
    gradients, _ = _gradients(layers, width, seed, device)
    last = gradients[-1]
    squared = last.square().sum()
    back = gradients[::-1]
    return Carried(
        [((one * last).sum() / squared).item() for one in back],
        [(one.norm() / squared.sqrt()).item() for one in back],
    )


def equation_errors(blocks: int, width: int, seed: int, device: torch.device) -> list[float]:
    """How far ∂L/∂x of every block is from ∂L/∂y · (∂F/∂x + 1) where ReLU passes, relative to its largest."""
    torch.manual_seed(seed)
    layers = [Block(width) for _ in range(blocks)]
    gradients, inputs = _gradients(layers, width, seed, device)
    errors = []
    for block, x, y, dx, dy in zip(layers, inputs, inputs[1:], gradients, gradients[1:], strict=False):
        jacobian = torch.func.vmap(torch.func.jacrev(block.branch))(x.double())  # [rows, width, width]
        passed = torch.where(y > 0, dy, 0.0)
        predicted = torch.einsum("ri,rij->rj", passed, jacobian) + passed
        errors.append(((dx - predicted).abs().max() / predicted.abs().max()).item())
    return errors


def _gradients(
    layers: Sequence[nn.Module], width: int, seed: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """∂L/∂x in float64, and x, before each layer and after the last, of ROWS digits."""
    stem, head = nn.Linear(64, width).to(device), nn.Linear(width, 10).to(device)
    data = digits.load(seed, device)
    x = stem(data.images[:ROWS])
    inputs = [x]
    for layer in layers:
        inputs.append(x := layer.to(device)(x))
    loss = F.cross_entropy(head(x), data.labels[:ROWS])
    gradients = torch.autograd.grad(loss, inputs)
    return [one.double() for one in gradients], [one.detach() for one in inputs]


# ------------------------------------------------------------------------------------------------ claims


def _equation(errors: list[float], blocks: int) -> Finding:
    error = reading.worst(errors)
    return Finding(
        "the gradient at a block's input is ∂L/∂y · (∂F/∂x + 1) where ReLU passes",
        f"but for {error:.1e} of its largest, over {blocks} blocks and {len(errors) // blocks} seeds; ∂F/∂x by "
        "autograd in float64",
        error < ROUNDING,
    )


def _claims(fan: Fan, depth: int) -> list[Finding]:
    """What the write-up says of Πλ, as it stands and in this project's form."""
    alone, near = (reading.worst(deviation(fan, scale, name, depth) for scale in SCALES) for name in ("0", SMALL))
    recorded = (
        value
        for by_name in fan.values()
        for seeds in by_name.values()
        for one in seeds
        for value in (*one.coefficient, *one.norm)
    )
    return [
        Finding(
            "the identity path from layer L back to l carries the coefficient Πλ",
            f"but for {alone:.1e} of it, for every λ and k ≤ {depth}, where branches count 0: nothing else is there, "
            "so this is arithmetic, and says no more than that skips are multiplied by λ",
            alone < ROUNDING,
        ),
        *_as_it_stands(fan, depth),
        Finding(
            f"of this project: with branches of scale {SMALL} the whole gradient still has the coefficient Πλ",
            f"but for {near:.1%}: the paths through branches add that much to it",
            near < NEAR,
        ),
        *_of_small_branches(fan, depth),
        reading.all_finite("coefficients and norms of all gradients", recorded),
    ]


def _as_it_stands(fan: Fan, depth: int) -> list[Finding]:
    """The three claims at a = 1, of every seed. What vanishes or explodes goes half of Πλ's decades at least."""
    ends = {scale: [one.norm[-1] for one in fan[scale][WHOLE]] for scale in SCALES}
    far = "holds where every λ and seed goes half of Πλ's decades at least"
    near = f"holds between 1/{ALONE:g} and {ALONE:g}"
    found = (  # by CLAIMS: the rule, whether it holds, whether it is known to
        (far, all(reading.worst(ends[scale]) < scale ** (depth / 2) for scale in BELOW), False),
        (far, all(reading.least(ends[scale]) > scale ** (depth / 2) for scale in ABOVE), True),
        (near, reading.least(ends[1.0]) > 1 / ALONE and reading.worst(ends[1.0]) < ALONE, False),
    )
    return [
        Finding(f"λ x + F(x): {words}", f"{_told(fan, WHOLE, scales, depth)}; {rule}", holds, expected)
        for (words, scales), (rule, holds, expected) in zip(CLAIMS.items(), found, strict=True)
    ]


def _of_small_branches(fan: Fan, depth: int) -> list[Finding]:
    """The three claims where branches are small: the norm is Πλ, but for a tenth, of every seed."""
    return [
        Finding(
            f"of this project: λ x + F(x) / depth: {words}",
            f"{_told(fan, SMALL, scales, depth)}; holds within {NEAR:.0%} of Πλ",
            reading.worst(abs(one.norm[-1] / scale**depth - 1) for scale in scales for one in fan[scale][SMALL]) < NEAR,
        )
        for words, scales in CLAIMS.items()
    ]


def _told(fan: Fan, name: str, scales: Sequence[float], depth: int) -> str:
    """‖∂L/∂x_0‖ / ‖∂L/∂x_L‖, its range over seeds, beside Πλ."""
    ends = {scale: reading.spread((one.norm[-1] for one in fan[scale][name]), ".2g") for scale in scales}
    told = ", ".join(f"λ = {scale:g}: {end} (Πλ {scale**depth:.2g})" for scale, end in ends.items())
    return f"‖∂L/∂x_0‖ / ‖∂L/∂x_L‖ is, {told}"


def deviation(fan: Fan, scale: float, name: str, depth: int) -> float:
    """The largest |coefficient / Πλ - 1| over depth and seeds."""
    return reading.worst(
        abs(one.coefficient[k] / scale**k - 1) for one in fan[scale][name] for k in range(1, depth + 1)
    )


# ------------------------------------------------------------------------------------------------ output


def _table(fan: Fan, options: argparse.Namespace) -> str:
    depth = options.depth
    names = list(branch_scales(depth))
    lines = [
        f"x_(l+1) = λ x_l + a ReLU(x_l Wᵀ + b), {depth} layers of width {options.width}, cross-entropy of {ROWS} "
        f"digits, {options.seeds} seeds",
        "",
        "over all layers, medians: Πλ; coefficient of ∂L/∂x_L in ∂L/∂x_0; ‖∂L/∂x_0‖ / ‖∂L/∂x_L‖",
        f"{'λ':>5}{'Πλ':>10}" + "".join(f"{'a = ' + name:>22}" for name in names[2:]),
    ]
    for scale in SCALES:
        cells = []
        for name in names[2:]:
            found = fan[scale][name]
            cells.append(
                f"{median(one.coefficient[-1] for one in found):12.2g}{median(one.norm[-1] for one in found):10.2g}"
            )
        lines.append(f"{scale:5g}{scale**depth:10.2g}{''.join(cells)}")
    lines += ["", "largest |coefficient / Πλ - 1| over layers and seeds"]
    lines.append(f"{'λ':>5}" + "".join(f"{'a = ' + name:>16}" for name in names))
    for scale in SCALES:
        lines.append(f"{scale:5g}" + "".join(f"{deviation(fan, scale, name, depth):16.1e}" for name in names))
    lines.append("Branches of scale 1 outweigh the identity path: Πλ says nothing then of the whole gradient.")
    return "\n".join(lines)


def _data(fan: Fan, errors: list[float], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    def short(values: Sequence[float]) -> list[float]:
        return [float(f"{value:.4g}") for value in values]

    found = {
        f"{scale:g}": {
            "predicted": short([scale**k for k in range(options.depth + 1)]),
            "branch_scales": {
                name: [{"coefficient": short(one.coefficient), "norm": short(one.norm)} for one in seeds]
                for name, seeds in by_name.items()
            },
        }
        for scale, by_name in fan.items()
    }
    facts = arguments.facts(options, device, "depth", "width", "blocks")
    return facts | {"rows": ROWS, "equation_errors": short(errors), "lambdas": found}


def _picture(fan: Fan, depth: int) -> Any:
    """Coefficients with small branches, and how far they are from Πλ by the scale of branches."""
    measured = {
        scale: [median(one.coefficient[k] for one in by_name[SMALL]) for k in range(depth + 1)]
        for scale, by_name in fan.items()
    }
    sizes = {name: value for name, value in branch_scales(depth).items() if value > 0}
    moved = {scale: [deviation(fan, scale, name, depth) for name in sizes] for scale in SCALES}
    return skip_scale_picture.draw(depth, measured, SMALL, sizes, moved, NEAR)
