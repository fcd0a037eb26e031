"""Layers of a model that follow one another, in one call of the engine's: where it takes them, else one by one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import Parameter

from .. import explanation, network_checks
from ..kernels.spec import NetworkSpec
from ..network import Network
from . import calls
from .chains import Chain
from .rewriting import options

Tensors = tuple[Tensor, ...]


class Part(NamedTuple):
    """A layer but for its tensors: of W, b, P, p, λ and a the place among those given, a number, or None."""

    name: str
    operands: tuple[int | float | None, ...]
    skip: str | None
    options: tuple[Any, ...]

    def of(self, tensors: Sequence[Any]) -> list[Any]:
        return [tensors[one] if type(one) is int else one for one in self.operands]


def parts_of(chain: Chain, names: Sequence[str]) -> tuple[list[Part], list[Node]]:
    """The layers, and the nodes of their tensors."""
    nodes: list[Node] = []
    parts: list[Part] = []
    for match, name in zip(chain, names, strict=True):
        places: list[int | float | None] = []
        for one in (
            match.weight, match.bias, match.projection_weight, match.projection_bias, match.skip_scale,
            match.branch_scale,
        ):  # fmt: skip
            places.append(len(nodes) if isinstance(one, Node) else one)
            nodes += [one] if isinstance(one, Node) else []
        skip = None if match.skip == "none" else match.skip
        parts.append(Part(name, tuple(places), skip, options(match)))
    return parts, nodes


def arguments_of(parts: Sequence[Part], tensors: Sequence[Any]) -> dict[str, Any]:
    """Those of `Network`.

    Raises:
        TypeError, ValueError: by `Network`, where the tensors are not what its layers have.
    """
    weights, biases, projections, projection_biases, skip_scales, branch_scales = zip(
        *(part.of(tensors) for part in parts), strict=True
    )
    activation, approximate, order, *_ = parts[0].options
    return {
        "weights": weights,
        "biases": biases,
        "activation": activation,
        "approximate": approximate,
        "order": order,
        "skip": [part.skip for part in parts],
        "skip_scale": skip_scales,
        "branch_scale": branch_scales,
        "projection_weights": projections,
        "projection_biases": projection_biases,
        "last_activation": "none" if parts[-1].options[0] == "none" else "same",
    }


def described(parts: Sequence[Part], tensors: Sequence[Any]) -> NetworkSpec:
    """The network of these layers. Raises what `Network` does."""
    given = arguments_of(parts, tensors)
    own = [given[name] for name in ("activation", "approximate", "order", "last_activation")]
    spec, _ = network_checks.described(
        given["weights"], given["biases"], given["projection_weights"], given["projection_biases"], given["skip"],
        given["skip_scale"], given["branch_scale"], (*own, 0.0, "auto"),
    )  # fmt: skip
    return spec


def _begins_frozen(x: Tensor, tensors: Tensors) -> bool:
    """Whether layers before the first that is trained would be kept for a backward that never comes to them."""
    if x.requires_grad or tensors[0].requires_grad or not torch.is_grad_enabled():
        return False
    return any(one.requires_grad for one in tensors)


class Layers:
    """x, and the layers' tensors as they stand at that call, -> y. Holds a network of the tensors of its last call."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.name = f"{parts[0].name}…{parts[-1].name}"
        self._bound: tuple[Tensors, Network | None] | None = None
        self.__name__, self.__qualname__, self.__module__ = "layers", "layers", __name__  # for torch.fx's code

    def let_go(self) -> None:
        """Before tensors may change places with others: nobody else may hold them."""
        self._bound = None

    def __call__(self, x: Tensor, *tensors: Tensor) -> Tensor:
        bound = self._bound
        if bound is None or not all(map(is_, tensors, bound[0])):
            bound = self._bind(tensors)
        network = bound[1]
        if network is not None and isinstance(x, Tensor) and x.is_cpu and not _begins_frozen(x, tensors):
            try:
                if explanation.is_listening():
                    with explanation.part(self.name):
                        return network(x)
                return network(x)
            except (TypeError, ValueError, NotImplementedError):
                pass  # one by one, it is found which of them does not fit
            except RuntimeError:
                if not x.is_nested and x.layout is torch.strided:
                    raise
        for part in self.parts:
            W, b, P, p, skip_scale, branch_scale = part.of(tensors)
            x = calls.layer(x, W, b, None, P, p, skip_scale, branch_scale, part.options, part.name)
        return x

    def _bind(self, tensors: Tensors) -> tuple[Tensors, Network | None]:
        """Parameters alone: what a transform or `functional_call` gives is another at every call."""
        self._bound = None
        if not all(type(one) is Parameter and one.is_cpu for one in tensors):
            return (), None
        network: Network | None = None
        with suppress(TypeError, ValueError):  # told by the layer that does not fit, when it is called
            network = Network(**arguments_of(self.parts, tensors))
        self._bound = bound = (tensors, network)  # returned as it is: other threads bind, too
        return bound
