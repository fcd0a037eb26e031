"""The networks of systems A and D, each in one call; parameters, names and draws are those of eager."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import dispatch
from ..network import Network
from ..reference import ProjectionStack, ShapeGatedStack


class _Bound(NamedTuple):
    """A network, and where in the module its tensors stood when it was made: (the place, a name in it, the tensor)."""

    network: Network
    origins: list[tuple[Mapping[str, Any], str, Tensor]]

    @property
    def is_current(self) -> bool:
        return all(place.get(name) is tensor for place, name, tensor in self.origins)


class _OneCall(nn.Module):
    """Calls all layers as one `Network`, made at the first call, and anew where a parameter has been replaced."""

    _bound: _Bound | None = None

    def forward(self, x: Tensor) -> Tensor:
        # compilers and transforms call with tensors of their own, which are not to outlive the call
        if torch.compiler.is_compiling() or dispatch.transforms_are_active():
            return self._make()(x)
        if self._bound is None or not self._bound.is_current:
            network = self._make()
            self._bound = _Bound(network, _origins(self, network.parameters))
        return self._bound.network(x)

    def _make(self) -> Network:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_bound"}


class FusedShapeGatedStack(_OneCall, ShapeGatedStack):
    """System A: x [..., d₀] -> [..., d_L]."""

    def _make(self) -> Network:
        linears = _linears(self.layers)
        return Network(
            [one.weight for one in linears],
            [one.bias for one in linears],
            skip=["identity" if takes_skip else None for takes_skip in self.skips],
        )


class FusedProjectionStack(_OneCall, ProjectionStack):
    """System D: x [..., d₀] -> [..., d_L]."""

    def _make(self) -> Network:
        linears, found = _linears(self.layers), dict(self.projections.items())
        projections = [cast(nn.Linear | None, found.get(str(i))) for i in range(len(linears))]
        return Network(
            [one.weight for one in linears],
            [one.bias for one in linears],
            skip="auto" if self.use_shortcut else None,
            projection_weights=[None if one is None else one.weight for one in projections],
            projection_biases=[None if one is None else one.bias for one in projections],
        )


def _linears(layers: nn.ModuleList) -> list[nn.Linear]:
    return [cast(nn.Linear, cast(nn.Sequential, layer)[0]) for layer in layers]


def _origins(module: nn.Module, tensors: Sequence[Tensor]) -> list[tuple[Mapping[str, Any], str, Tensor]]:
    wanted = {id(t) for t in tensors}
    places = [(one._parameters, name, t) for one in module.modules() for name, t in one._parameters.items()]
    return [(place, name, t) for place, name, t in places if id(t) in wanted]
