"""Eager networks into stacks and back: parameters copied, and a stack compared with what it is to compute."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..reference import ResidualStack, Sin

_PROBES = 5  # rows
_SAME = 1e-9  # of the largest number, in float64
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Identity: "none",
    Sin: "sin",
}


def recipe_of(module: nn.Module, options: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """Sizes and options of the stack that computes what an eager network does; options given stand.

    Raises:
        TypeError, ValueError: the network is built otherwise, or computes something else.
    """
    if isinstance(module, ResidualStack):
        return list(module.recipe.sizes), module.recipe.options | options
    linears, found = _read(module)
    _refuse_other_parts(module)
    sizes = [linears[0].in_features, *(linear.out_features for linear in linears)]
    kinds = ["projection"] if dict(getattr(module, "projections", {})) else ["auto", None]
    candidates = [found | {"skip": kind} | options for kind in kinds]
    for candidate in candidates:
        if _computes_the_same(module, ResidualStack(sizes, device="meta", **candidate)):
            return sizes, candidate
    tried = " or ".join(", ".join(f"{name}={value!r}" for name, value in one.items()) for one in candidates)
    raise ValueError(f"{type(module).__name__} computes something else than a stack of its layers would, with {tried}")


def filled(to: nn.Module, values: Mapping[str, Tensor], is_training: bool) -> nn.Module:
    """`to`, made on the meta device, with copies of these tensors by layer, and their `requires_grad`."""
    to.load_state_dict({name: value.detach().clone() for name, value in values.items()}, assign=True)
    by_layer = getattr(to, "by_layer", dict)
    for name, parameter in to.named_parameters():
        required = {values[part].requires_grad for part in by_layer({name: parameter})}
        if len(required) > 1:
            raise ValueError(
                f"the layers of {name} are one parameter, and of the module's some require a gradient, some not"
            )
        parameter.requires_grad_(required.pop())
    return to.train(is_training)


def _read(module: nn.Module) -> tuple[list[nn.Linear], dict[str, Any]]:
    """The linear layers, and the activations as options."""
    layers = getattr(module, "layers", None)
    if not isinstance(layers, nn.ModuleList | nn.Sequential) or len(layers) == 0:
        raise TypeError(
            f"module must have `layers`, an nn.ModuleList of nn.Sequential(nn.Linear, activation), got {module}"
        )
    linears, activations = [], []
    for i, layer in enumerate(layers):
        parts = list(layer) if isinstance(layer, nn.Sequential) else [None]
        if type(parts[0]) is not nn.Linear or parts[0].bias is None or len(parts) > 2:
            raise TypeError(f"layers.{i} must be nn.Sequential(nn.Linear with a bias, activation), got {layer}")
        linears.append(parts[0])
        activations.append(_activation(i, parts[1] if len(parts) == 2 else nn.Identity()))
    *others, last = activations
    if len(set(others or [last])) > 1 or last not in ((others or [last])[0], ("none", "none")):
        raise ValueError(f"activations must be the same in all layers, or none in the last, got {activations}")
    named = [id(value) for _, value in module.named_parameters(remove_duplicate=False)]
    if len(set(named)) < len(named):
        raise ValueError(f"{type(module).__name__} uses a parameter in several places, and a stack has one for each")
    (activation, approximate), is_linear = (others or [last])[0], bool(others) and last != others[0]
    found = {"activation": activation, "approximate": approximate, "last_activation": "none" if is_linear else "same"}
    return linears, found


def _activation(i: int, module: nn.Module) -> tuple[str, str]:
    if type(module) is nn.GELU:
        return "gelu", module.approximate
    if type(module) not in _ACTIVATIONS:
        raise TypeError(f"layers.{i}.1 must be one of the activations that a stack has, got {module}")
    return _ACTIVATIONS[type(module)], "none"


def _refuse_other_parts(module: nn.Module) -> None:
    """Raises TypeError for modules that are neither layers nor projections: dropout, norms, what a stack has not."""
    known = {"layers", "projections"}
    for name, part in module.named_modules():
        if name and name.partition(".")[0] not in known:
            raise TypeError(f"module must have `layers` and `projections` alone, got {name}, {part}")


def _computes_the_same(module: nn.Module, twin: ResidualStack) -> bool:
    """Whether both give the same output and gradients in float64, of a few rows and with parameters drawn anew.

    The module's own may hide what it does: a head that begins at 0 makes all networks one.
    """
    exact = deepcopy(module).double().cpu().requires_grad_()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in exact.parameters():
            value.copy_(
                torch.randn(value.shape, generator=draw, dtype=torch.float64) * max(value.shape[-1:] or [1]) ** -0.5
            )
    try:
        filled(twin, dict(exact.named_parameters()), exact.training)
    except RuntimeError as error:
        raise ValueError(f"{type(module).__name__} has other parameters than a stack of its layers: {error}") from None
    x = torch.randn(_PROBES, twin.recipe.sizes[0], dtype=torch.float64, generator=draw).requires_grad_()

    def outcome(model: nn.Module) -> list[Tensor]:
        with torch.random.fork_rng([]), torch.enable_grad():
            y = model(x)
            inputs = [x, *(value for _, value in sorted(model.named_parameters()))]
            found = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True, materialize_grads=True)
        return [y.detach(), *found]

    pairs = list(zip(outcome(exact), outcome(twin), strict=True))
    return all(a.shape == b.shape and bool((a - b).abs().max() <= _SAME * a.abs().max()) for a, b in pairs)
