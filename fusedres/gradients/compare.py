"""The gradients of a fused model and of its eager twin, side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike

from torch import Tensor, nn

from . import picture
from .profile import GradientProfile, Loss, measure, profile_of, trainable


@dataclass(frozen=True)
class GradientComparison:
    """Two readouts, and max |g_fused - g_eager| / max |g_eager| of every trainable parameter by its name."""

    fused: GradientProfile
    eager: GradientProfile
    relative_difference: dict[str, float]

    @property
    def largest_relative_difference(self) -> float:
        """Over weights, biases, scales: over all that is trained."""
        return max(self.relative_difference.values())

    def table(self) -> str:
        """One line per weight, mean |∂L/∂W| of both and how far they are apart; then the worst of all parameters."""
        width = max(map(len, self.eager.mean_abs))
        lines = [
            f"fused: loss {self.fused.loss:.3e}, {self.fused.skips}",
            f"eager: loss {self.eager.loss:.3e}, {self.eager.skips}",
            f"{'mean |∂L/∂W|':{width}}  {'fused':>9}  {'eager':>9}  relative difference",
        ]
        for name, eager in self.eager.mean_abs.items():
            fused, difference = self.fused.mean_abs[name], self.relative_difference[name]
            lines.append(f"{name:{width}}  {fused:9.2e}  {eager:9.2e}  {difference:19.1e}")
        worst, difference = max(self.relative_difference.items(), key=lambda item: item[1])
        lines.append(f"largest of {len(self.relative_difference)} parameters: {difference:.1e} ({worst})")
        return "\n".join(lines)

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
    """Profiles of both models from the same random state, and the relative difference of every parameter's gradient.

    0 where both gradients are 0; inf where only eager's is, and where either is not finite. The arguments and their
    errors are those of `gradient_profile`; ValueError besides if the two do not train the same parameters.
    """
    _check_same_parameters(fused, eager)
    fused_loss, fused_gradients = measure(fused, x, target, loss_fn)
    eager_loss, eager_gradients = measure(eager, x, target, loss_fn)
    return GradientComparison(
        profile_of(fused, fused_loss, fused_gradients),
        profile_of(eager, eager_loss, eager_gradients),
        {name: _relative_difference(fused_gradients[name], dw) for name, dw in eager_gradients.items()},
    )


def _relative_difference(fused: Tensor, eager: Tensor) -> float:
    if eager.numel() == 0:
        return 0.0
    difference = (fused.double() - eager.double()).abs().max().item()
    if difference == 0:
        return 0.0
    scale = eager.abs().max().item()
    return difference / scale if scale > 0 and math.isfinite(difference) else math.inf


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
