"""Mean |∂L/∂W| of every weight of a model after one forward and one backward that leave no trace in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import picture

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class GradientProfile:
    """One readout: the loss, mean |∂L/∂W| by parameter name, and which of the model's layers take a skip."""

    loss: float
    mean_abs: dict[str, float]
    layers: tuple[str, ...]
    skips_taken: tuple[str, ...]
    declares_skips: bool = True  # False: a plain model, whose layers cannot tell what its forward adds to them

    @property
    def skips(self) -> str:
        """How many layers take a skip, as a sentence."""
        if not self.declares_skips:
            return f"none of {len(self.layers)} layers says whether it takes a skip"
        return f"{len(self.skips_taken)} of {len(self.layers)} layers take a skip"

    def table(self) -> str:
        """One line per weight: its name, mean |∂L/∂W|, and whether its layer takes a skip."""
        width = max(map(len, self.mean_abs))
        lines = [f"loss {self.loss:.3e}, {self.skips}", f"{'weight':{width}}  mean |∂L/∂W|  skip"]
        for name, mean in self.mean_abs.items():
            takes_skip = any(_owns(layer, name) for layer in self.skips_taken)
            lines.append(f"{name:{width}}  {mean:12.3e}  {'taken' if takes_skip else '-'}")
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws mean |∂L/∂W| over the weights on a log scale; ImportError without matplotlib."""
        figure = picture.new_figure(8, 5)
        axes = figure.subplots()
        picture.draw_gradients(axes, [picture.Series("mean |∂L/∂W|", self.mean_abs, picture.BLUE, "-", ".")])
        axes.set_title(f"loss {self.loss:.3e}, {self.skips}")
        picture.save(figure, path)


def gradient_profile(
    model: nn.Module, x: Tensor, target: Tensor | None = None, loss_fn: Loss | None = None
) -> GradientProfile:
    """Mean |∂L/∂W| of every trainable weight for L = loss_fn(model(x), target), by default MSE, against zeros.

    Without a target, loss_fn is called with the output alone. Weights are the floating parameters named `weight` of two
    dimensions and more; one that the loss does not reach counts as 0. The model's gradients, mode and buffers and the
    random state stay as they were. TypeError or ValueError for arguments that give no scalar loss or no gradient.
    """
    return profile_of(model, *measure(model, x, target, loss_fn))


def measure(
    model: nn.Module, x: Tensor, target: Tensor | None, loss_fn: Loss | None
) -> tuple[float, dict[str, Tensor]]:
    """The loss and its gradient by every trainable parameter, from one forward and one backward."""
    _check(model, x, loss_fn)
    parameters = _trained(model)
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
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return loss.item(), _by_layer(model, dict(zip(parameters, gradients, strict=True)))


def profile_of(model: nn.Module, loss: float, gradients: dict[str, Tensor]) -> GradientProfile:
    """The profile of a model from its measured gradients."""
    layers, skips_taken, declares_skips = _residual_layers(model)
    mean_abs = {name: _mean_abs(gradient) for name, gradient in gradients.items() if _is_weight(name, gradient)}
    return GradientProfile(loss, mean_abs, layers, skips_taken, declares_skips)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The floating parameters that require a gradient, by name; each layer's where a module stacks them."""
    return _by_layer(model, _trained(model))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: value for name, value in named if value.requires_grad and value.is_floating_point()}


def _by_layer(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by parameter name, those that a module says to be stacked (by a method `by_layer`) as slices."""
    for prefix, module in model.named_modules():
        split = getattr(module, "by_layer", None)
        if callable(split):
            tensors = split(tensors, f"{prefix}." if prefix else "")
    return tensors


def _is_weight(name: str, value: Tensor) -> bool:
    return value.dim() >= 2 and name.rpartition(".")[2] == "weight"


def _mean_abs(gradient: Tensor) -> float:
    """In fp32 at least: the mean of a half-precision gradient may be below what half precision can say."""
    if gradient.numel() == 0:
        return 0.0
    return gradient.abs().mean(dtype=torch.promote_types(gradient.dtype, torch.float32)).item()


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


def _residual_layers(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
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
