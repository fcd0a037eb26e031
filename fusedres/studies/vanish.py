"""System A: mean |∂L/∂W| of every layer with and without skips, and why a skip, a matter of ∂/∂x, helps it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, log10
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gradients import compare_gradients, gradient_profile
from ..reference import ShapeGatedStack
from ..stack import FusedResidualStack
from . import arguments, halves, vanish_picture
from .report import Finding, Report, require
from .values import NothingToMeasure

WIDE = (128, 256, 512, 1024, 512, 256, 128, 1)
NAMES = {True: "with skips", False: "without"}
DECADES = 1.0  # of our median from the write-up's figure, which is of one draw; draws spread over four and more


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
    twins = {case.title: _apart(case, options.seed, device) for case, _ in plan}

    cases = [case for case, _ in plan]
    findings = [*(one for case in cases for one in _claims(case, drawn[case.title], options.seed)), _zero_claim(zeros)]
    findings += answer(drawn[small.title])
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
    mean_abs = list(gradient_profile(stack, x).mean_abs.values())
    loss = F.mse_loss(y := stack(x), torch.zeros_like(y))
    loss.backward()
    reached = halves.reached(stack, x, lambda y: F.mse_loss(y, torch.zeros_like(y)))
    return Draw(
        mean_abs,
        total=[one.total.norm().item() for one in reached],
        branch=[one.branch.norm().item() for one in reached],
        skip=[0.0 if one.skip is None else one.skip.norm().item() for one in reached],
        skips_alone=halves.through_skips_alone(reached, [1.0] * len(reached)),
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


def _apart(case: Case, seed: int, device: torch.device) -> float:
    """Between fused and eager, the largest relative difference of a gradient, with skips, under the first seed."""
    fused = case.build(True, seed).to(device)
    eager = ShapeGatedStack(case.sizes).to(device)
    eager.load_state_dict(fused.state_dict())
    return compare_gradients(fused, eager, case.x().to(device)).largest_relative_difference


# ------------------------------------------------------------------------------------------------ claims


def _claims(case: Case, drawn: dict[bool, list[Draw]], seed: int) -> list[Finding]:
    """The decades of the write-up, and how many layers take the skip."""
    findings = []
    for has_skips, printed in (case.printed or {}).items():
        for place, where in ((0, "first"), (-1, "last")):
            values = [_log(draw.mean_abs[place]) for draw in drawn[has_skips]]
            claimed = log10(printed[place])
            findings.append(
                Finding(
                    f"{case.title}, {NAMES[has_skips]}: mean |∂L/∂W| of the {where} layer is of the decade of "
                    f"{printed[place]:.1e}, 10^{claimed:.1f}",
                    f"median 10^{median(values):.1f} of {len(values)} seeds, from {_power(min(values))} to "
                    f"{_power(max(values))}; holds within {DECADES:g} decade of the median",
                    abs(median(values) - claimed) <= DECADES,
                )
            )
    skips = case.build(True, seed).skips
    taken = f"{sum(skips)} of {len(skips)} layers take the skip"
    same = all(a.mean_abs == b.mean_abs for a, b in zip(*drawn.values(), strict=True))
    if any(K == N for K, N in pairwise(case.sizes)):
        gains = [_log(a.mean_abs[0]) - _log(b.mean_abs[0]) for a, b in zip(*drawn.values(), strict=True)]
        measured = f"{taken}; first layer, with skips over without: median 10^{median(gains):.1f}"
        findings.append(Finding(f"{case.title}: skips keep the gradient", measured, median(gains) > 2))
    else:
        measured = f"{taken}: no two neighbours are alike. Gradients {'are equal bit for bit' if same else 'differ'}"
        findings.append(Finding(f"{case.title}: the effect of the skips has vanished", measured, same))
    return findings


def _zero_claim(zeros: dict[str, dict[int, int]]) -> Finding:
    ones = {name: found.get(1, 0) for name, found in zeros.items()}
    more = {name: sum(count for layers, count in found.items() if layers > 1) for name, found in zeros.items()}
    draws = sum(zeros["eager"].values())
    return Finding(
        "case 1, with skips: one layer's gradient can come out as exactly 0",
        f"just one layer in {ones['eager']} of {draws} draws by eager and in {ones['fused']} fused; more, mostly all, "
        f"in {more['eager']} and {more['fused']}: there the last GELU saturates, and the output is 0",
        max(ones.values()) > 0,
    )


def answer(drawn: dict[bool, list[Draw]]) -> list[Finding]:
    """Why a skip helps ∂L/∂W: that is made of the gradient at the layer's output, which comes through later skips.

    Draws whose last GELU is saturated, so that hardly any gradient enters, are left out of comparisons of digits, and
    those where none arrives at the first layer. NothingToMeasure where that is all of them.
    """
    alive = [
        (a, b)
        for a, b in zip(drawn[True], drawn[False], strict=True)
        if a.mean_abs[-1] > 1e-6 and min(a.total[0], a.branch[0]) > 0
    ]
    if not alive:
        raise NothingToMeasure(f"no gradient passes in any draw of case 1, of {len(drawn[True])}: try more --seeds")
    outer = max(
        abs(of_outer - mean) / mean
        for pair in alive
        for one in pair
        for of_outer, mean in zip(one.outer, one.mean_abs, strict=True)
        if mean > 0
    )
    # of the same x, W and z, and so of the same φ'(z): what differs with skips is g alone
    same = max(_unexplained(a, b) for a, b in alive)
    kept = {has: median(_ratio(draw) for draw in drawn[has]) for has in NAMES}
    alone = median(a.skips_alone[0] / a.total[0] for a, _ in alive)
    of_half = median(a.skip[0] / a.branch[0] for a, _ in alive)
    return [
        Finding(
            "∂L/∂W of a layer is the outer product of dz = g φ'(z) and x, with g what reaches the layer's OUTPUT",
            f"mean |∂L/∂W| is mean |dz| · mean |x| but for {outer:.1e} of it, over all layers and seeds",
            outer < 1e-4,
        ),
        Finding(
            "so ∂L/∂W of the first layer gains from skips what g gains, and nothing else: its x, W and z are the same",
            f"(∂L/∂W with) / (∂L/∂W without) is (g with) / (g without) but for {same:.1e} of it",
            same < 1e-3,
        ),
        Finding(
            "g is ∂L/∂x of the next layer; one half of that comes through its skip as it is, as far as the first layer",
            f"from the last skip's end to the input ‖∂L/∂x‖ becomes {kept[True]:.1e} times as much with skips, "
            f"{kept[False]:.1e} without (medians); {alone:.2f} of it come through skips alone; at the first layer the "
            f"skip's half is {of_half:.1f} times the branch's",
            kept[True] > 0.1 and kept[False] < 1e-3 * kept[True],
        ),
    ]


def _unexplained(a: Draw, b: Draw) -> float:
    """How far (∂L/∂W with) / (∂L/∂W without) of the first layer is from (g with) / (g without), relatively."""
    gains = a.reached[0].g / b.reached[0].g
    return (a.dweight / b.dweight / gains[:, None] - 1).abs().max().item()


def _ratio(draw: Draw) -> float:
    """‖∂L/∂x‖ at the first layer over that at the last layer's input, where the last skip ends."""
    return draw.total[0] / draw.total[-1] if draw.total[-1] > 0 else 0.0


def _power(exponent: float) -> str:
    return f"10^{exponent:.1f}" if exponent > -inf else "0"


def _log(value: float) -> float:
    return log10(value) if value > 0 else -inf


# ------------------------------------------------------------------------------------------------ output


def _profile(case: Case, drawn: dict[bool, list[Draw]]) -> vanish_picture.Profile:
    skips = case.build(True, 0).skips
    values = {NAMES[has]: [draw.mean_abs for draw in draws] for has, draws in drawn.items()}
    printed = {NAMES[has]: ends for has, ends in (case.printed or {}).items()}
    return vanish_picture.Profile(f"{sum(skips)} of {len(skips)} layers take the skip", values, printed)


def _table(
    cases: Sequence[Case],
    drawn: dict[str, dict[bool, list[Draw]]],
    twins: dict[str, float],
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
                values = [_log(draw.mean_abs[i]) for draw in drawn[case.title][has]]
                cells.append(f"{median(values):8.1f} {f'({min(values):.1f} … {max(values):.1f})':>15}")
            lines.append(f"{case.title if i == 0 else '':8}{i:6}{''.join(cells)}")
        if case.printed:
            ends = [" … ".join(f"{log10(one):.1f}" for one in case.printed[has]) for has in NAMES]
            lines.append(f"{'':8}{'write-up':>8}{ends[0]:>22}{ends[1]:>24}")
        lines.append(f"{'':8}fused and eager differ by {twins[case.title]:.1g} of a gradient's largest")
    for name, found in zeros.items():
        listed = ", ".join(f"{layers}: {count}" for layers, count in found.items())
        lines.append(f"draws of case 1 with skips by how many layers have gradient exactly 0, {name}: {listed}")
    return "\n".join(lines)


def _data(
    options: argparse.Namespace,
    device: torch.device,
    cases: Sequence[Case],
    drawn: dict[str, dict[bool, list[Draw]]],
    twins: dict[str, float],
    zeros: dict[str, dict[int, int]],
) -> dict[str, Any]:
    quantities = ("mean_abs", "total", "branch", "skip", "skips_alone")
    found: dict[str, Any] = {}
    for case in cases:
        runs = {
            NAMES[has]: {name: [[_short(v) for v in getattr(draw, name)] for draw in draws] for name in quantities}
            for has, draws in drawn[case.title].items()
        }
        skips = case.build(True, options.seed).skips
        apart = {"fused_and_eager_differ_by": _short(twins[case.title])}
        found[case.title] = {"sizes": case.sizes, "skips_taken": sum(skips), "layers": len(skips)} | apart | runs
    counted = {name: {str(layers): count for layers, count in of.items()} for name, of in zeros.items()}
    facts = arguments.facts(options, device, "width", "depth", "wide_seeds", "draws")
    return facts | {"cases": found, "draws_by_layers_of_gradient_0": counted}


def _short(value: float) -> float:
    return float(f"{value:.3g}")
