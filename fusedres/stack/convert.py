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


def _computes_the_same(module: nn.Module, twin: ResidualStack) -> bool:
    """Whether both give the same in float64, on a few rows."""
    exact = deepcopy(module).double().cpu().eval()
    try:
        filled(twin, dict(exact.named_parameters()), False)
    except RuntimeError as error:
        raise ValueError(f"{type(module).__name__} has other parameters than a stack of its layers: {error}") from None
    x = torch.randn(_PROBES, twin.recipe.sizes[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = exact(x), twin(x)
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() <= _SAME * theirs.abs().max())
