"""A deep stack cut into stages, for `torch.distributed.pipelining`."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from ..stack import FusedResidualStack, convert


def stages(stack: FusedResidualStack, n: int) -> list[FusedResidualStack]:
    """n stacks, one after the other what the stack computes: neighbouring layers, as many in each as in the others.

    Parameters are copied, with their dtype, device, mode and `requires_grad`; layer i of a stage that begins at layer
    `first` of the stack has its names with i in the place of first + i. A stack on the meta device has stages there.

    Raises:
        TypeError: stack is no FusedResidualStack, or n no integer.
        ValueError: n is not between 1 and the number of layers.
    """
    if not isinstance(stack, FusedResidualStack):
        raise TypeError(
            f"stack must be a FusedResidualStack, got {type(stack).__name__}; "
            "of an nn.Sequential take slices, model[a:b]"
        )
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n must be an integer, the number of stages, got {type(n).__name__}")
    depth = len(stack.recipe.layers)
    if not 1 <= n <= depth:
        raise ValueError(f"n must be between 1 and {depth}, the layers that there are to share out, got {n}")
    return [_stage(stack, range(depth * i // n, depth * (i + 1) // n)) for i in range(n)]


def _stage(stack: FusedResidualStack, layers: range) -> FusedResidualStack:
    recipe = stack.recipe
    specs = [recipe.layers[i] for i in layers]
    options: dict[str, Any] = dict(recipe.options)
    for name in ("skip_scale", "branch_scale", "drop_path"):
        options[name] = _shortest([getattr(spec, name) for spec in specs])
    if all(spec.skip == "none" for spec in specs):
        options["learn_skip_scale"] = False
    if layers[-1] != len(recipe.layers) - 1:
        options.pop("last_activation", None)
    sizes = recipe.sizes[layers[0] : layers[-1] + 2]
    stage = FusedResidualStack(sizes, recompute=stack.recompute, device="meta", **options)
    return cast(FusedResidualStack, convert.filled(stage, _renamed(stack.by_layer(), layers), stack.training))


def _shortest(values: list[float]) -> float | list[float]:
    return values[0] if len(set(values)) == 1 else values


def _renamed(by_layer: dict[str, Tensor], layers: range) -> dict[str, Tensor]:
    """Of the tensors named `kind.i.…`, those of these layers, counted from the first."""
    found = {}
    for name, value in by_layer.items():
        kind, i, *rest = name.split(".")
        if int(i) in layers:
            found[".".join([kind, str(int(i) - layers[0]), *rest])] = value
    return found
