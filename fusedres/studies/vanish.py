"""System A: mean |∂L/∂W| of every layer with and without skips, and why a skip, a matter of ∂/∂x, helps it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gradients import GradientComparison, compare_gradients, gradient_profile
from ..reference import ShapeGatedStack
from ..stack import FusedResidualStack
from . import arguments, halves, reading, vanish_claims, vanish_picture
from .report import Report, require
from .vanish_claims import NAMES, log

WIDE = (128, 256, 512, 1024, 512, 256, 128, 1)


class Case(NamedTuple):
    """A list of sizes, and what the write-up printed: mean |∂L/∂W| of the first and of the last layer, by skips."""

    title: str
    sizes: tuple[int, ...]
    printed: Mapping[bool, tuple[float, float]] | None

    def x(self) -> Tensor:
        return torch.ones(self.sizes[0])

    def build(self, has_skips: bool, seed: int) -> FusedResidualStack:
        torch.manual_seed(seed)
        return FusedResidualStack(self.sizes, skip="auto" if has_skips else None)


CASE_1 = Case("case 1", (3,) * 13 + (1,), {True: (1.5e-2, 4.3e-1), False: (1.3e-8, 1.5e-2)})
CASE_2 = Case("case 2", WIDE, {True: (4.9e-7, 2.2e-4), False: (6.8e-7, 4.2e-4)})


@dataclass
class Draw:
    """One seed of a case, with skips or without: per layer from the first to the last."""

    mean_abs: list[float]  # |∂L/∂W|
    total: list[float]  # ‖∂L/∂x‖
    branch: list[float]  # its half through the branch
    skip: list[float]  # its half through the skip, 0 without one
    skips_alone: list[float]  # ‖Πλ g‖
    weight: list[float]  # ‖∂L/∂W‖
    outer: list[float]  # mean |dz| · mean |x|, which is mean |∂L/∂W| where one sample makes it an outer product
    reached: list[halves.Reached]
    dweight: Tensor  # ∂L/∂W of the first layer


def options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(seeds=50)
    arguments.number(parser, "--width", 3, "of case 1", most=1024)
    arguments.number(parser, "--depth", 13, "layers of case 1, the last of them to one feature", least=2, most=1000)
    arguments.number(parser, "--wide-seeds", 5, "initialisations of case 2")
    arguments.number(parser, "--draws", 500, "initialisations of case 1 in which layers of gradient 0 are counted")


def run(options: argparse.Namespace, device: torch.device) -> Report:
    """Both cases under every seed beside the write-up, and the halves. ImportError where a package is missing."""
    require("matplotlib", "tqdm")
    from tqdm import tqdm

    arguments.one_thread(device)
    sizes = (options.width,) * options.depth + (1,)
    small = CASE_1 if sizes == CASE_1.sizes else CASE_1._replace(sizes=sizes, printed=None)
    plan = ((small, arguments.seeds(options)), (CASE_2, arguments.seeds(options, options.wide_seeds)))
    drawn: dict[str, dict[bool, list[Draw]]] = {}
    with tqdm(total=2 * sum(len(seeds) for _, seeds in plan) + 2 * options.draws, desc="vanish", unit="draw") as bar:
        for case, seeds in plan:
            drawn[case.title] = {has_skips: [] for has_skips in NAMES}
            for seed in seeds:
                for has_skips in NAMES:
                    drawn[case.title][has_skips].append(_draw(case, has_skips, seed, device))
                    bar.update()
        zeros = {}
        for name, build in (("fused", FusedResidualStack), ("eager", ShapeGatedStack)):
            zeros[name] = _zeros(build, small, arguments.seeds(options, options.draws), device, bar)
    twins = {case.title: _twins(case, _first_alive(seeds, drawn[case.title][True]), device) for case, seeds in plan}

    cases = [case for case, _ in plan]
    findings = [one for case in cases for one in vanish_claims.of_case(case, drawn[case.title], options.seed)]
    findings += [*vanish_claims.answer(drawn[small.title]), reading.agreement(twins), vanish_claims.all_finite(drawn)]
    return Report(
        name="vanish",
        question="How much gradient reaches the weights of each layer, with skips and without, and why?",
        table=_table(cases, drawn, twins, zeros),
        findings=findings,
        data=_data(options, device, cases, drawn, twins, zeros),
        figures={
            "": vanish_picture.profiles({case.title: _profile(case, drawn[case.title]) for case in cases}),
            "halves": vanish_picture.halves(small.title, drawn[small.title]),
        },
    )


def _draw(case: Case, has_skips: bool, seed: int, device: torch.device) -> Draw:
    stack = case.build(has_skips, seed).to(device)
    x = case.x().to(device)
    profile = gradient_profile(stack, x)
    loss = F.mse_loss(y := stack(x), torch.zeros_like(y))
    loss.backward()
    reached = halves.reached(stack, x, lambda y: F.mse_loss(y, torch.zeros_like(y)))
    return Draw(
        mean_abs=list(profile.mean_abs.values()),
        total=[one.total.norm().item() for one in reached],
        branch=[one.branch.norm().item() for one in reached],
        skip=[0.0 if one.skip is None else one.skip.norm().item() for one in reached],
        skips_alone=halves.through_skips_alone(reached, [1.0] * len(reached)),
        weight=[profile.parameters[name].norm for name in profile.mean_abs],
        outer=[_outer(one, layer[0]) for one, layer in zip(reached, stack.layers, strict=True)],
        reached=reached,
        dweight=stack.layers[0][0].weight.grad.double(),
    )


def _outer(one: halves.Reached, linear: nn.Linear) -> float:
    """mean |dz| · mean |x| of dz = g φ'(z), from the gradient g that reaches the layer's output."""
    z = F.linear(one.x, linear.weight.detach().double(), linear.bias.detach().double()).requires_grad_()
    (dz,) = torch.autograd.grad(F.gelu(z), z, one.g)
    return (dz.abs().mean() * one.x.abs().mean()).item()


def _zeros(build: type[nn.Module], case: Case, seeds: range, device: torch.device, bar: Any) -> dict[int, int]:
    """How many draws with skips have so many layers whose gradient is exactly 0."""
    found: Counter[int] = Counter()
    for seed in seeds:
        torch.manual_seed(seed)
        profile = gradient_profile(build(case.sizes).to(device), case.x().to(device))
        found[sum(value == 0 for value in profile.mean_abs.values())] += 1
        bar.update()
    return dict(sorted(found.items()))


def _first_alive(seeds: range, draws: Sequence[Draw]) -> int:
    """The first of all where none is."""
    return next((seed for seed, draw in zip(seeds, draws, strict=True) if vanish_claims.is_alive(draw)), seeds[0])


def _twins(case: Case, seed: int, device: torch.device) -> GradientComparison:
    """Fused and eager with skips, under one seed."""
    fused = case.build(True, seed).to(device)
    eager = ShapeGatedStack(case.sizes).to(device)
    eager.load_state_dict(fused.state_dict())
    return compare_gradients(fused, eager, case.x().to(device))


# ------------------------------------------------------------------------------------------------ output


def _profile(case: Case, drawn: dict[bool, list[Draw]]) -> vanish_picture.Profile:
    skips = case.build(True, 0).skips
    values = {NAMES[has]: [draw.mean_abs for draw in draws] for has, draws in drawn.items()}
    printed = {NAMES[has]: ends for has, ends in (case.printed or {}).items()}
    return vanish_picture.Profile(f"{sum(skips)} of {len(skips)} layers take the skip", values, printed)


def _table(
    cases: Sequence[Case],
    drawn: dict[str, dict[bool, list[Draw]]],
    twins: dict[str, GradientComparison],
    zeros: dict[str, dict[int, int]],
) -> str:
    lines = [
        "log10 of mean |∂L/∂W|: median over seeds, and range",
        f"{'':8}{'layer':>6}{'with skips':>24}{'without':>24}",
    ]
    for case in cases:
        for i in range(len(case.sizes) - 1):
            cells = []
            for has in NAMES:
                values = [log(draw.mean_abs[i]) for draw in drawn[case.title][has]]
                cells.append(f"{median(values):8.1f} {f'({min(values):.1f} … {max(values):.1f})':>15}")
            lines.append(f"{case.title if i == 0 else '':8}{i:6}{''.join(cells)}")
        if case.printed:
            ends = [" … ".join(f"{log10(one):.1f}" for one in case.printed[has]) for has in NAMES]
            lines.append(f"{'':8}{'write-up':>8}{ends[0]:>22}{ends[1]:>24}")
        apart = twins[case.title].largest_relative_difference
        lines.append(f"{'':8}fused and eager differ by {apart:.1g} of a gradient's largest")
    lines.append("a gradient of exactly 0: the write-up's draw with skips had one such layer; counted, not judged:")
    for name, found in zeros.items():
        listed = ", ".join(f"{layers}: {count}" for layers, count in found.items())
        lines.append(f"draws of case 1 with skips by how many layers have gradient exactly 0, {name}: {listed}")
    return "\n".join(lines)


def _data(
    options: argparse.Namespace,
    device: torch.device,
    cases: Sequence[Case],
    drawn: dict[str, dict[bool, list[Draw]]],
    twins: dict[str, GradientComparison],
    zeros: dict[str, dict[int, int]],
) -> dict[str, Any]:
    quantities = ("mean_abs", "weight", "total", "branch", "skip", "skips_alone")
    found: dict[str, Any] = {}
    for case in cases:
        runs = {
            NAMES[has]: {name: [[_short(v) for v in getattr(draw, name)] for draw in draws] for name in quantities}
            for has, draws in drawn[case.title].items()
        }
        skips = case.build(True, options.seed).skips
        apart = {"fused_and_eager_differ_by": _short(twins[case.title].largest_relative_difference)}
        found[case.title] = {"sizes": case.sizes, "skips_taken": sum(skips), "layers": len(skips)} | apart | runs
    counted = {name: {str(layers): count for layers, count in of.items()} for name, of in zeros.items()}
    facts = arguments.facts(options, device, "width", "depth", "wide_seeds", "draws")
    return facts | {"cases": found, "draws_by_layers_of_gradient_0": counted}


def _short(value: float) -> float:
    return float(f"{value:.3g}")
