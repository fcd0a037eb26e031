"""The demo: fused against eager, in the gradients of systems A and D and in the training of a classifier of digits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import Eager, Native, Triton, backend
from ..dispatch import eager as eager_formula
from ..explanation import explain
from ..gradients import GradientComparison, compare_gradients, picture, table
from ..modules import FusedResidualLinear
from ..reference import ProjectionStack, ShapeGatedStack
from ..stack import FusedResidualStack
from . import digits

# Of a loss of order 1. Over the first steps other rounding moves it by 1e-6; later the weights themselves part, as they
# do between any two roundings (measured: up to 1e-2 after 165 steps), so only the first steps tell a wrong gradient.
FP32_LOSSES, FIRST_STEPS = 1e-4, 55

WIDTH, DEPTH, BATCH, LEARNING_RATE, WARM_UP_STEPS = 128, 6, 128, 3e-3, 3

STYLES = {  # colour, line and marker of the picture
    "with skips": (picture.BLUE, "-", "o"),
    "without skips": (picture.VERMILION, "--", "s"),
}


class Case(NamedTuple):
    """Twins built from (sizes, whether they take skips), and the input both are given."""

    title: str
    fused: Callable[[list[int], bool], nn.Module]
    eager: Callable[[list[int], bool], nn.Module]
    sizes: list[int]
    x: Callable[[], Tensor]


def _fused_stack(sizes: list[int], has_skips: bool) -> nn.Module:
    return FusedResidualStack(sizes, skip="auto" if has_skips else None)


def _fused_projections(sizes: list[int], has_skips: bool) -> nn.Module:
    return FusedResidualStack(sizes, skip="projection" if has_skips else None)


_SIZES_A2, _SIZES_D = [128, 256, 512, 1024, 512, 256, 128, 1], [128, 64, 32, 16, 8, 1]
CASES = (
    Case("A, case 1: equal widths", _fused_stack, ShapeGatedStack, [3] * 13 + [1], lambda: torch.ones(3)),
    Case("A, case 2: no two widths alike", _fused_stack, ShapeGatedStack, _SIZES_A2, lambda: torch.ones(128)),
    Case("D: projections", _fused_projections, ProjectionStack, _SIZES_D, lambda: torch.randn(10, 128)),
)
Comparisons = dict[str, dict[str, GradientComparison]]  # by the case's title, then by the name of a style


@dataclass
class Training:
    """The loss of every step, the seconds they took, and the accuracy on held-out digits at the end."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    accuracy: float = 0.0


class EagerResidualLinear(nn.Linear):
    """x + gelu(x Wᵀ + b) where the sizes agree, else gelu(x Wᵀ + b): x [..., K] -> [..., N]."""

    def forward(self, x: Tensor) -> Tensor:
        branch = F.gelu(super().forward(x))
        return x + branch if self.in_features == self.out_features else branch


_LAYERS: dict[str, Callable[[int, int], nn.Module]] = {"eager": EagerResidualLinear, "fused": FusedResidualLinear}


def run(out: Path, epochs: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Prints every comparison, writes pictures and data into `out`; what is written, and what failed, for JSON.

    ImportError where a package that the demo needs is missing.
    """
    missing = [name for name in ("matplotlib", "sklearn", "tqdm") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install fusedres[demo]")
    if device.type == "cpu":
        torch.set_num_threads(1)  # two cores shared with other work: 20 s of training became 0.2 s
    out.mkdir(parents=True, exist_ok=True)
    print(_where(device))

    print("\nWhat runs one layer:")
    torch.manual_seed(seed)
    explain(FusedResidualLinear(WIDTH, device=device), torch.randn(BATCH, WIDTH, device=device))

    comparisons = compare_cases(seed, device)
    trainings = train_both(epochs, seed, device)
    difference = _largest_difference(trainings)
    print(f"losses of the first {FIRST_STEPS} steps differ by {difference:.1g} at most")

    _draw_comparisons(comparisons, out / "gradients.png")
    _draw_trainings(trainings, difference, device, out / "training.png")
    facts = {"where": _where(device), "torch": torch.__version__, "seed": seed}
    cases = {title: {name: one.to_dict() for name, one in pair.items()} for title, pair in comparisons.items()}
    gradients: dict[str, Any] = facts | {"cases": cases}
    curves = {name: asdict(training) for name, training in trainings.items()}
    training = facts | {"formula_of_fused": _formula(device)} | curves
    _write(out / "gradients.json", gradients)
    _write(out / "training.json", training)
    written = [str(out / name) for name in ("gradients.png", "gradients.json", "training.png", "training.json")]
    print("\nWritten:", *written)
    failed = verdict(comparisons, difference)
    return {"agrees": not failed, "failed": failed, "written": written} | gradients | training


def compare_cases(seed: int, device: torch.device) -> Comparisons:
    """Every case with and without skips, fused against eager from the same draws; prints each table."""
    from tqdm import tqdm

    comparisons: Comparisons = {case.title: {} for case in CASES}
    with tqdm(total=len(CASES) * len(STYLES), desc="gradients", unit="comparison") as progress:
        for case in CASES:
            for name in STYLES:
                progress.set_postfix_str(f"{case.title}, {name}")
                comparison = _compare(case, name == "with skips", seed, device)
                comparisons[case.title][name] = comparison
                progress.write(f"\n{case.title}, {name}\n{comparison.table()}")
                progress.update()
    return comparisons


def _compare(case: Case, has_skips: bool, seed: int, device: torch.device) -> GradientComparison:
    fused, eager = (_seeded(twin, case.sizes, has_skips, seed).to(device) for twin in (case.fused, case.eager))
    return compare_gradients(fused, eager, _input(case, seed).to(device))


def _seeded(build: Callable[[list[int], bool], nn.Module], sizes: list[int], has_skips: bool, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(sizes, has_skips)


def _input(case: Case, seed: int) -> Tensor:
    torch.manual_seed(seed + 1)  # other draws than those of the weights
    return case.x()


def train_both(epochs: int, seed: int, device: torch.device) -> dict[str, Training]:
    """One classifier of scanned digits trained eager and fused from the same draws, an epoch each by turns."""
    from tqdm import tqdm

    print(f"\nA residual classifier of scanned digits, {epochs} epochs, eager and fused by turns.")
    choice = _choice(device)
    if isinstance(choice, Native):
        print("Fused trains through the C++ engine on the CPU, one thread each.")
    elif not _trains_fused(device):
        why = "the interpreter is too slow to train with" if isinstance(choice, Triton) else choice.because
        print(f"No kernels here: {why}, so both run the eager formula.")
        print("That the curves coincide is expected then, and the times say nothing about the kernels.")
    images, labels, held_out_images, held_out_labels = digits.load(seed, device)
    models = {name: _classifier(layer, seed).to(device) for name, layer in _LAYERS.items()}
    optimizers = {name: torch.optim.AdamW(model.parameters(), LEARNING_RATE) for name, model in models.items()}
    trainings = {name: Training() for name in models}

    steps = epochs * (len(images) // BATCH)
    with (
        nullcontext() if _trains_fused(device) else eager_formula(),
        tqdm(total=len(models) * steps, desc="training", unit="step") as progress,
    ):
        for model in models.values():
            _warm_up(deepcopy(model), images[:BATCH], labels[:BATCH])
        for epoch in range(epochs):
            # Neither always goes first: what the machine does meanwhile falls on both.
            for name in list(models)[:: 1 if epoch % 2 == 0 else -1]:
                batches = digits.batches(len(images), BATCH, seed + epoch, device)
                start = _now(device)
                losses = [_step(models[name], optimizers[name], images[rows], labels[rows]) for rows in batches]
                trainings[name].seconds += _now(device) - start
                trainings[name].losses += torch.stack(losses).tolist()
                progress.update(len(losses))
        for name, training in trainings.items():
            with torch.no_grad():
                guesses = models[name](held_out_images).argmax(-1)
            training.accuracy = (guesses == held_out_labels).double().mean().item()
            progress.write(
                f"{name}: {training.accuracy:.1%} of held-out digits right, "
                f"last loss {training.losses[-1]:.4f}, {training.seconds:.2f} s"
            )
    return trainings


def _classifier(layer: Callable[[int, int], nn.Module], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(layer(64, WIDTH), *(layer(WIDTH, WIDTH) for _ in range(DEPTH)), nn.Linear(WIDTH, 10))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _warm_up(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Compiles and allocates outside the timed steps."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    for _ in range(WARM_UP_STEPS):
        _step(model, optimizer, images, labels)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _largest_difference(trainings: dict[str, Training]) -> float:
    """NaN where a loss is: then nothing coincides."""
    fused, eager = (torch.tensor(trainings[name].losses[:FIRST_STEPS]) for name in ("fused", "eager"))
    return (fused - eager).abs().max().item()


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}: Triton kernels run on the GPU"
    reason = "GPU left aside" if torch.cuda.is_available() else "no GPU"
    choice = _choice(device)
    if isinstance(choice, Triton):
        return f"{reason}: Triton kernels run through Triton's interpreter on the CPU"
    if isinstance(choice, Native):
        return f"{reason}: {choice.because}"
    return f"{reason}: the eager formula runs for fused layers too, because {choice.because}"


def _choice(device: torch.device) -> Eager | Native | Triton:
    return backend(device, torch.float32)


def _trains_fused(device: torch.device) -> bool:
    """Whether fused layers train through kernels, which an interpreter would make too slow."""
    choice = _choice(device)
    return isinstance(choice, Native) or (isinstance(choice, Triton) and choice.target != "interpreter")


def _formula(device: torch.device) -> str:
    if isinstance(_choice(device), Native):
        return "C++ engine"
    return "fused kernels" if _trains_fused(device) else "eager formula"


def _draw_comparisons(comparisons: Comparisons, path: Path) -> None:
    figure = picture.new_figure(16, 6)
    for axes, (title, pair) in zip(figure.subplots(1, len(comparisons)), comparisons.items(), strict=True):
        series = [
            one
            for name, comparison in pair.items()
            for one in picture.coincidence(
                comparison.fused.mean_abs, comparison.eager.mean_abs, f", {name}", *STYLES[name]
            )
        ]
        picture.draw_gradients(axes, series)
        largest = max(comparison.largest_relative_difference for comparison in pair.values())
        axes.set_title(f"{title}\n{pair['with skips'].fused.skips}\nfused and eager differ by {largest:.1g} relative")
    picture.save(figure, path)


def _draw_trainings(trainings: dict[str, Training], difference: float, device: torch.device, path: Path) -> None:
    figure = picture.new_figure(8, 5)
    axes = figure.subplots()
    for name, color, line, width in (("eager", picture.SKY, "-", 5.0), ("fused", "black", "--", 1.5)):
        training = trainings[name]
        label = f"{name}: {training.accuracy:.1%} of held-out digits right"
        axes.plot(range(1, len(training.losses) + 1), training.losses, line, color=color, linewidth=width, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (cross-entropy)")
    axes.set_title(f"fused runs the {_formula(device)}; first {FIRST_STEPS} losses differ by {difference:.1g} at most")
    axes.grid(axis="y", color="0.9")
    picture.save(figure, path)


def _write(path: Path, data: dict[str, object]) -> None:
    """What is not finite becomes null: JSON knows no infinity."""
    path.write_text(json.dumps(table.finite(data), indent=1) + "\n")


def verdict(comparisons: Comparisons, loss_difference: float) -> list[str]:
    """Says whether fused and eager agree, or where they do not, and returns it: one line each."""
    failures = [
        f"{title}, {name}: {objection}"
        for title, pair in comparisons.items()
        for name, comparison in pair.items()
        for objection in comparison.objections
    ]
    if not loss_difference <= FP32_LOSSES:  # so that NaN fails
        failures.append(f"training: losses differ by {loss_difference:.1g}, above {FP32_LOSSES:.0e}")

    for failure in failures:
        print("FAILED", failure)
    if not failures:
        print("Fused and eager agree, in gradients and in training.")
    return failures
