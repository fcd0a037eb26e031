"""The gradients of a fused model and of its eager twin, side by side, and whether they agree."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import Tensor, nn

from .. import recording
from . import picture, table, verdict
from .readout import GradientProfile, Loss, measure, profile_of, trainable
from .truth import truth_of
from .verdict import AGREES, Errors, LayerVerdict


@dataclass(frozen=True)
class GradientComparison:
    """Two readouts, and how far apart they are.

    Attributes:
        fused: the profile of the one.
        eager: of the other.
        errors: of every trainable parameter, by its name.
        layers: a verdict on every layer, by its name.
        rules: by which it is given, in words.
        unit: what a unit is; None where there are none.
        why_no_units: why there are none.
    """

    fused: GradientProfile
    eager: GradientProfile
    errors: dict[str, Errors]
    layers: dict[str, LayerVerdict]
    rules: tuple[str, ...]
    unit: str | None  # what a unit is; None where there are none
    why_no_units: str = ""

    @property
    def relative_difference(self) -> dict[str, float]:
        """max |fused - eager| / max |eager|: 0 where both are 0, inf where eager's alone is or either is not finite."""
        return {name: found.relative for name, found in self.errors.items()}

    @property
    def largest_relative_difference(self) -> float:
        """Over weights, biases, scales: over all that is trained."""
        return max(self.relative_difference.values())

    @property
    def agrees(self) -> bool:
        """Whether every layer does."""
        return all(layer.verdict == AGREES for layer in self.layers.values())

    @property
    def exit_code(self) -> int:
        """Of a command that compares: 0 or 1."""
        return 0 if self.agrees else 1

    @property
    def objections(self) -> list[str]:
        """One line for each layer that does not agree."""
        return [f"{name} {one.verdict}: {one.because}" for name, one in self.layers.items() if one.verdict != AGREES]

    def table(self) -> str:
        """One line per layer: its weight's mean |∂L/∂W| of both, its parameters' largest errors, the verdict on it.

        Then the worst of all parameters, what a unit is, the rules, and the layers that do not agree.
        """
        weights = {verdict.owner(name): name for name in self.eager.mean_abs}
        names = {layer: weights.get(layer, layer) for layer in self.layers}
        width = max(len("mean |∂L/∂W|"), *map(len, names.values()))
        lines = [
            f"fused: loss {self.fused.loss:.3e}, {self.fused.skips}",
            f"eager: loss {self.eager.loss:.3e}, {self.eager.skips}",
            f"{'':{width}}  {'':9}  {'':9}  {'largest error':>18}  {'in units':>16}",
            f"{'mean |∂L/∂W|':{width}}      fused      eager  absolute  relative      max      rms  verdict",
        ]
        for layer, (said, _, worst) in self.layers.items():
            means = [_number(profile.mean_abs.get(names[layer]), 9, ".2e") for profile in (self.fused, self.eager)]
            differences = [_number(value, 8, ".1e") for value in (worst.absolute, worst.relative)]
            units = [_number(value, 7, ".2g") for value in (worst.max_units, worst.rms_units)]
            lines.append("  ".join([f"{names[layer]:{width}}", *means, *differences, *units, said]))
        return "\n".join([*lines, *self._footer()])

    def _footer(self) -> list[str]:
        name, worst = max(self.errors.items(), key=lambda item: item[1].relative)
        lines = [f"largest of {len(self.errors)} parameters: {worst.relative:.1e} relative ({name})"]
        if self.unit:
            lines += [f"one unit: {self.unit}", *(f"rule for {rule}" for rule in self.rules)]
        else:
            lines += [f"no units: {self.why_no_units}", *self.rules]
        agreeing = len(self.layers) - len(self.objections)
        return [*lines, *self.objections, f"fused and eager agree in {agreeing} of {len(self.layers)} layers"]

    def to_dict(self) -> dict[str, Any]:
        """Everything in the words of JSON; what is not finite becomes None."""
        profiles = {
            name: {"loss": one.loss, "skips": one.skips, "mean_abs": dict(one.mean_abs)}
            for name, one in (("fused", self.fused), ("eager", self.eager))
        }
        layers = {name: {"verdict": one.verdict, "because": one.because} for name, one in self.layers.items()}
        found = {
            "agrees": self.agrees,
            "unit": self.unit,
            "why_no_units": self.why_no_units,
            "rules": list(self.rules),
            **profiles,
            "layers": layers,
            "parameters": {name: one._asdict() for name, one in self.errors.items()},
        }
        return table.finite(found)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws both on a log scale, fused as markers on eager's line; ImportError without matplotlib."""
        figure = picture.new_figure(8, 5)
        axes = figure.subplots()
        picture.draw_gradients(axes, picture.coincidence(self.fused.mean_abs, self.eager.mean_abs))
        axes.set_title(f"largest relative difference {self.largest_relative_difference:.1e}, {self.fused.skips}")
        picture.save(figure, path)


def compare_gradients(
    fused: nn.Module, eager: nn.Module, x: Tensor, target: Tensor | None = None, loss_fn: Loss | None = None
) -> GradientComparison:
    """Profiles of both models from the same random state, and how far apart the gradients of every parameter are.

    Both are measured against a float64 copy of eager, with x and target in float64 where they are floating. Where the
    copy cannot be had the comparison says why, and judges by relative differences.

    Args:
        fused: the model in question.
        eager: one that trains parameters of the same names and shapes.
        x: the input of both.
        target: as in `gradient_profile`.
        loss_fn: as in `gradient_profile`; where it holds tensors it has to take float64 too.

    Raises:
        TypeError: as `gradient_profile`.
        ValueError: as `gradient_profile`; and where the two do not train the same parameters.
    """
    _check_same_parameters(fused, eager)
    with recording.set_aside():
        fused_loss, fused_gradients = measure(fused, x, target, loss_fn)
        eager_loss, eager_gradients = measure(eager, x, target, loss_fn)
        truth = truth_of(eager, eager_gradients, x, target, loss_fn)
    errors = {
        name: verdict.errors_of(fused_gradients[name], gradient, truth.gradients[name] if truth.gradients else None)
        for name, gradient in eager_gradients.items()
    }
    return GradientComparison(
        profile_of(fused, fused_loss, fused_gradients),
        profile_of(eager, eager_loss, eager_gradients),
        errors,
        verdict.by_layer(errors, truth.dtypes),
        verdict.rules(truth.dtypes.values(), has_units=truth.gradients is not None),
        truth.unit,
        truth.why_none,
    )


def _number(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def _check_same_parameters(fused: nn.Module, eager: nn.Module) -> None:
    for name, model in (("fused", fused), ("eager", eager)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
    of_fused, of_eager = trainable(fused), trainable(eager)
    only_eager = [name for name in of_eager if name not in of_fused]
    only_fused = [name for name in of_fused if name not in of_eager]
    if only_eager or only_fused:
        missing = [f"fused lacks {', '.join(only_eager)}"] if only_eager else []
        missing += [f"eager lacks {', '.join(only_fused)}"] if only_fused else []
        raise ValueError(f"fused and eager must train parameters of the same names: {'; '.join(missing)}")
    for name, value in of_eager.items():
        expected, got = list(value.shape), list(of_fused[name].shape)
        if expected != got:
            raise ValueError(f"{name} must be {expected}, its shape in eager, got {got} in fused")
