"""How gradient reaches the layers of a model: one forward and one backward that leave no trace in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recording
from ..kernels import record
from . import picture, table
from .statistics import InputGradient, Rows, Statistics, statistics_of
from .watch import Watch, empty

Loss = Callable[..., Tensor]
Layers = tuple[tuple[str, ...], tuple[str, ...], bool]  # all, those that take a skip, whether they say so
Split = tuple[Callable[[dict[str, Tensor], str], dict[str, Tensor]], str]


@dataclass(frozen=True)
class GradientProfile:
    """One readout of a model's gradients.

    Attributes:
        loss: its value, None where it was not told.
        mean_abs: mean |∂L/∂W| by the name of the weight.
        layers: their names.
        skips_taken: of those that take a skip.
        declares_skips: False for a plain model, whose layers cannot tell what its forward adds to them.
        parameters: of every trainable parameter, by name, weights, biases and scales alike.
        inputs: of the gradient that reaches each layer's input, by layer, and of "output", ∂L/∂y of the model. Layers
            whose input requires no gradient are not there, nor those of other modules that run inside compiled code.
        step: of the training, 0 for a single readout.
    """

    loss: float | None
    mean_abs: dict[str, float]
    layers: tuple[str, ...]
    skips_taken: tuple[str, ...]
    declares_skips: bool = True
    parameters: dict[str, Statistics] = field(default_factory=dict)
    inputs: dict[str, InputGradient] = field(default_factory=dict)
    step: int = 0

    @property
    def skips(self) -> str:
        """How many layers take a skip, as a sentence."""
        if not self.declares_skips:
            return f"none of {len(self.layers)} layers says whether it takes a skip"
        return f"{len(self.skips_taken)} of {len(self.layers)} layers take a skip"

    def takes_skip(self, parameter: str) -> bool:
        """Whether the layer of this parameter takes a skip."""
        return any(_owns(layer, parameter) for layer in self.skips_taken)

    def table(self) -> str:
        """One line per weight, then one per layer's input, with the two halves of its gradient."""
        return table.of_profile(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can say it: what is not finite is None."""
        return table.finite(
            {
                "step": self.step,
                "loss": self.loss,
                "layers": list(self.layers),
                "skips_taken": list(self.skips_taken),
                "declares_skips": self.declares_skips,
                "parameters": {name: one.to_dict() for name, one in self.parameters.items()},
                "inputs": {name: one.to_dict() for name, one in self.inputs.items()},
            }
        )

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws mean |∂L/∂W| over the weights on a log scale; ImportError without matplotlib."""
        figure = picture.new_figure(8, 5)
        axes = figure.subplots()
        picture.draw_gradients(axes, [picture.Series("mean |∂L/∂W|", self.mean_abs, picture.BLUE, "-", ".")])
        axes.set_title(f"loss {self.loss:.3e}, {self.skips}" if self.loss is not None else self.skips)
        picture.save(figure, path)


def profile(model: nn.Module, x: Tensor, target: Tensor | None = None, loss_fn: Loss | None = None) -> GradientProfile:
    """The gradients of L = loss_fn(model(x), target), by default MSE, against zeros, by every trainable parameter, and
    those that reach the layers' inputs.

    Weights are the floating parameters named `weight` of two dimensions and more; one that the loss does not reach
    counts as 0. The model's gradients, mode and buffers and the random state stay as they were.

    Args:
        model: any module.
        x: its input.
        target: of the output's shape, or whatever loss_fn takes.
        loss_fn: called with the output and the target, or with the output alone where there is none; gives one number.

    Raises:
        TypeError: an argument is of another type, or the loss is no tensor.
        ValueError: the loss is not one number, or depends on no trainable parameter; target is of another shape.
    """
    _check(model, x, loss_fn)
    watch = Watch(model)
    with recording.set_aside(), watch.installed():
        loss, gradients = measure(model, x, target, loss_fn)
        rows, scales = watch.take()
    if rows is None:
        return profile_of(model, loss, gradients)
    of_inputs = Rows.of(rows.cpu())
    inputs = watch.inputs(
        of_inputs.numbers.tolist(), statistics_of(of_inputs), [None if s is None else float(s) for s in scales]
    )
    return profile_of(model, loss, gradients, inputs)


def measure(
    model: nn.Module, x: Tensor, target: Tensor | None, loss_fn: Loss | None
) -> tuple[float, dict[str, Tensor]]:
    """The loss and its gradient by every trainable parameter, from one forward and one backward."""
    _check(model, x, loss_fn)
    parameters = trained(model)
    devices = {tensor.device for tensor in (x, *model.parameters(), *model.buffers()) if tensor.device.type != "cpu"}
    device_type = next(iter(devices)).type if devices else "cuda"
    with (
        torch.random.fork_rng(list(devices), device_type=device_type),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        # The forward sees copies of the buffers, so that running statistics move in the copies.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        loss = _loss(torch.func.functional_call(model, buffers, (x,)), target, loss_fn)
        wanted = [*parameters.values(), *([x] if x.requires_grad else [])]  # a network computes what is asked for
        gradients = torch.autograd.grad(loss, wanted, materialize_grads=True)[: len(parameters)]
    dense = (g.to_dense() if g.is_sparse else g for g in gradients)
    return loss.item(), by_layer(model, dict(zip(parameters, dense, strict=True)))


def profile_of(
    model: nn.Module,
    loss: float | None,
    gradients: dict[str, Tensor],
    inputs: dict[str, InputGradient] | None = None,
) -> GradientProfile:
    """The profile of a model from its measured gradients."""
    told = statistics_of(Rows.of(rows_of(list(gradients.values()), 1.0).cpu()))
    found = dict(zip(gradients, told, strict=True))
    return from_statistics(residual_layers(model), loss, gradients, found, inputs or {})


def rows_of(gradients: list[Tensor], unscale: float | Tensor) -> Tensor:
    """What is recorded of each gradient, [n, ROW], on the first one's device."""
    if not gradients:
        return torch.zeros(0, record.ROW, dtype=torch.float64)
    dense = [g.to_dense() if g.is_sparse else g for g in gradients]
    devices = {g.device for g in dense}
    if len(devices) == 1 and all(g.numel() for g in dense):
        return recording.statistics(dense, None, unscale)
    rows = torch.zeros(len(dense), record.ROW, dtype=torch.float64, device=dense[0].device)
    for device in devices:
        places = [i for i, g in enumerate(dense) if g.device == device and g.numel()]
        if places:
            rows[places] = recording.statistics([dense[i] for i in places], None, unscale).to(rows.device)
    return rows


def from_statistics(
    layers: Layers,
    loss: float | None,
    gradients: Mapping[str, Tensor],
    found: Mapping[str, Statistics],
    inputs: dict[str, InputGradient],
    step: int = 0,
) -> GradientProfile:
    """The profile from the statistics of gradients that were found; others the loss does not reach."""
    parameters = {name: found.get(name) or empty(gradient.numel()) for name, gradient in gradients.items()}
    mean_abs = {name: _mean_abs(parameters[name]) for name, gradient in gradients.items() if _is_weight(name, gradient)}
    return GradientProfile(loss, mean_abs, *layers, parameters, inputs, step)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The floating parameters that require a gradient, by name; each layer's where a module stacks them."""
    return by_layer(model, trained(model))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The same as they are held, stacked or not."""
    named = model.named_parameters()
    return {name: value for name, value in named if value.requires_grad and value.is_floating_point()}


def by_layer(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by parameter name, those that a module says to be stacked (by a method `by_layer`) as slices."""
    return split(tensors, splits_of(model))


def splits_of(model: nn.Module) -> list[Split]:
    """Who takes stacked tensors apart, and the beginning of their names."""
    named = [(getattr(module, "by_layer", None), prefix) for prefix, module in model.named_modules()]
    return [(method, f"{prefix}." if prefix else "") for method, prefix in named if callable(method)]


def split(tensors: dict[str, Tensor], splits: list[Split]) -> dict[str, Tensor]:
    """Stacked tensors as slices."""
    for method, prefix in splits:
        tensors = method(tensors, prefix)
    return tensors


def _is_weight(name: str, value: Tensor) -> bool:
    return value.dim() >= 2 and name.rpartition(".")[2] == "weight"


def _mean_abs(statistics: Statistics) -> float:
    """Of all numbers: infinite where one is not finite."""
    return statistics.mean_abs if statistics.non_finite == 0 else math.inf


def _loss(output: Tensor, target: Tensor | None, loss_fn: Loss | None) -> Tensor:
    if loss_fn is not None:
        loss = loss_fn(output) if target is None else loss_fn(output, target)
    elif not isinstance(output, Tensor):
        raise TypeError(f"without a loss_fn the model must return a tensor, got {type(output).__name__}")
    elif target is not None and target.shape != output.shape:
        raise ValueError(f"target must be {list(output.shape)}, the shape of the output, got {list(target.shape)}")
    else:
        loss = F.mse_loss(output, torch.zeros_like(output) if target is None else target)

    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return a single number, got a tensor of shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("the loss depends on no trainable parameter, so there is no gradient to read")
    return loss


def _check(model: nn.Module, x: Tensor, loss_fn: Loss | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    if not any(_is_weight(name, value) for name, value in trainable(model).items()):
        raise ValueError(
            f"{type(model).__name__} has no trainable weight: a floating parameter named `weight`, "
            "of two dimensions or more, that requires a gradient"
        )


def residual_layers(model: nn.Module) -> Layers:
    """Names of the layers that could take a skip, of those that do, and whether the model says so at all."""
    skips = getattr(model, "skips", None)
    if isinstance(skips, (list, tuple)) and all(isinstance(taken, bool) for taken in skips):
        taken_by_layer = {f"layers.{i}": taken for i, taken in enumerate(skips)}
    else:
        resolved = {name or "model": getattr(module, "resolved_skip", None) for name, module in model.named_modules()}
        taken_by_layer = {name: skip != "none" for name, skip in resolved.items() if isinstance(skip, str)}
    if taken_by_layer:
        return tuple(taken_by_layer), tuple(name for name, taken in taken_by_layer.items() if taken), True
    plain = tuple(name or "model" for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return plain, (), False


def _owns(layer: str, parameter: str) -> bool:
    return parameter.startswith(f"{layer}.") or (layer == "model" and "." not in parameter)
