"""Layers of one width whose parameters are stacked, and what stands in the place of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..stack_checks import Recipe


class Run(nn.Module):
    """Parameters of L layers [d, d]: weight [L, d, d], bias [L · d], and where learned skip_scale [L], branch_scale
    [L] or [L · d].

    What is a vector, or a number, of each layer lies flat, so that it is of one dimension as eager's are: rules that go
    by that, as for weight decay, find the same.
    """

    def __init__(self, layers: range, recipe: Recipe, **factory: Any) -> None:
        super().__init__()
        L, d = len(layers), recipe.sizes[layers[0]]
        self.layers = layers
        self.width = d
        self.name = f"{layers[0]}-{layers[-1]}"
        self.weight = nn.Parameter(torch.empty(L, d, d, **factory))
        self.bias = nn.Parameter(torch.empty(L * d, **factory))
        shapes = ((), recipe.scale_shape(layers[0]))
        starts = [recipe.scale_starts(i) for i in layers]
        self._starts = tuple(zip(*starts, strict=True))
        self.skip_scale, self.branch_scale = (
            nn.Parameter(torch.empty(L, *shape, **factory).flatten()) if values[0] is not None else None
            for shape, values in zip(shapes, self._starts, strict=True)
        )
        self.is_per_channel = recipe.learns_branch_scale == "channel"
        self.reset_scales()

    def reset_scales(self) -> None:
        """The learned scales, each to where it starts."""
        for scale, starts in zip((self.skip_scale, self.branch_scale), self._starts, strict=True):
            if scale is not None:
                with torch.no_grad():
                    values = torch.tensor(starts, dtype=scale.dtype, device=scale.device)
                    scale.copy_(values.repeat_interleave(scale.numel() // len(starts)))

    def slices(self, name: str, stack: Tensor | None) -> Sequence[Tensor | None]:
        """A tensor shaped as one of the parameters, layer by layer."""
        if stack is None:
            return [None] * len(self.layers)
        return self._rows(name, stack).unbind(0)

    def slice(self, name: str, stack: Tensor, place: int) -> Tensor:
        """One of them, without taking the others apart."""
        return self._rows(name, stack)[place]

    def _rows(self, name: str, stack: Tensor) -> Tensor:
        stack = _gathered(stack)
        is_flat = name == "bias" or (name == "branch_scale" and self.is_per_channel)
        return stack.view(-1, self.width) if is_flat else stack

    def stacked(self, slices: Sequence[Any]) -> Tensor:
        """The other way: a weight from matrices, a flat tensor from vectors or numbers."""
        stack = torch.stack([one.full_tensor() if _is_divided(one) else one for one in slices])
        return stack if stack.dim() == 3 else stack.flatten()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        # after FSDP's, which divides the parameters again
        last = self.register_load_state_dict_pre_hook(_divide)  # type: ignore[no-untyped-call]
        super()._load_from_state_dict(*arguments)
        last.remove()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(value.shape)}" for name, value in self.named_parameters())


def _is_divided(tensor: Any) -> bool:
    """Whether ranks have parts of it: a DTensor, as FSDP leaves parameters; without importing what knows."""
    return hasattr(tensor, "placements")


def _gathered(stack: Any) -> Tensor:
    """The tensor whole on each rank: a layer may lie across them."""
    whole: Tensor = stack
    if _is_divided(stack):
        from torch.distributed.tensor import Replicate

        whole = stack.redistribute(placements=[Replicate()] * len(stack.placements))
    return whole


def _divide(run: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lays what is loaded out among ranks as the parameters are."""
    own: Any
    for name, own in run.named_parameters():
        value = state_dict.get(prefix + name)
        if _is_divided(own) and value is not None and not _is_divided(value):
            from torch.distributed.tensor import distribute_tensor

            state_dict[prefix + name] = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


class LinearSlice(nn.Linear):
    """One layer of a run as an nn.Linear: weight [d, d] and bias [d] are slices of the run's, to read, to call, or to
    change in place; `.grad` of a slice is the gradient's. The parameter itself is the run's.
    """

    def __init__(self, run: Run, layer: int) -> None:
        nn.Module.__init__(self)
        self.in_features = self.out_features = run.width
        self.__dict__["_place"] = (run, layer - run.layers[0])  # not as a submodule: the run is its stack's
        self.reset_parameters()

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        for name, value in self.named_parameters():
            destination[prefix + name] = value if keep_vars else value.detach()

    def register_parameter(self, name: str, param: Tensor | None) -> None:
        run: Run = self.__dict__["_place"][0]
        raise AttributeError(
            f"{name} of a layer in a run is a slice of runs.{run.name}.{name}, to be changed in place, not replaced"
        )

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The slices, for whoever asks this layer alone; a walk over all modules (recurse=False) finds the run's."""
        if recurse:
            for name in ("weight", "bias"):
                yield f"{prefix}.{name}" if prefix else name, getattr(self, name)

    def _get_name(self) -> str:
        return "Linear"


def _slice(name: str) -> Callable[[LinearSlice], Tensor]:
    def get(self: LinearSlice) -> Tensor:
        run, place = self.__dict__["_place"]
        parameter = getattr(run, name)
        found: Tensor = run.slice(name, parameter, place)
        if parameter.grad is not None:
            found.grad = run.slice(name, parameter.grad, place)
        return found

    return get


def _refused(name: str) -> Callable[[LinearSlice, Tensor], None]:
    return lambda self, value: self.register_parameter(name, value)


for _name in ("weight", "bias"):
    setattr(LinearSlice, _name, property(_slice(_name), _refused(_name)))


class StackLayers(nn.ModuleList):
    """The layers of a stack; asked for their parameters, slices of those that are stacked."""

    if TYPE_CHECKING:  # nn.ModuleList says nn.Module

        def __getitem__(self, index: int) -> StackLayer: ...  # type: ignore[override]

        def __iter__(self) -> Iterator[StackLayer]: ...

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for i, layer in enumerate(self if recurse else ()):
            yield from layer.named_parameters(f"{prefix}.{i}" if prefix else str(i))


class StackLayer(nn.Sequential):
    """φ(x Wᵀ + b), as eager's layer of that name; resolved_skip is what the stack adds: none, identity, projection."""

    def __init__(self, linear: nn.Linear, activation: nn.Module, skip: str) -> None:
        super().__init__(linear, activation)
        self.resolved_skip = skip

    if TYPE_CHECKING:  # nn.Sequential says nn.Module, which has no weight, and Any

        def __getitem__(self, index: Any) -> Any: ...

        def __call__(self, x: Tensor) -> Tensor: ...

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if recurse:
            yield from self[0].named_parameters(f"{prefix}.0" if prefix else "0")
