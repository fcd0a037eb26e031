"""The description of a residual stack as checked values, for the fused module and its eager twin alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from torch import Tensor

from . import checks
from .kernels.spec import LayerSpec
from .network_checks import naming, per

OPTIONS: dict[str, Any] = {  # of a stack, with their defaults
    "activation": "gelu",
    "approximate": "none",
    "order": "pre",
    "skip": "auto",
    "skip_scale": 1.0,
    "learn_skip_scale": False,
    "branch_scale": 1.0,
    "learn_branch_scale": False,
    "drop_path": 0.0,
    "last_activation": "same",
}


class Recipe(NamedTuple):
    """What a stack is, but for its parameters."""

    sizes: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    learns_skip_scale: bool
    learns_branch_scale: bool | str  # False, "scalar" or "channel"
    options: dict[str, Any]  # those that are not as OPTIONS says

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(K, N) of every layer."""
        return list(pairwise(self.sizes))

    @property
    def projected(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if layer.skip == "projection"]

    def scale_starts(self, i: int) -> tuple[float | None, float | None]:
        """Where the learned λ and a of layer i start, None for one that is not learned."""
        layer = self.layers[i]
        learns_skip = self.learns_skip_scale and layer.skip != "none"
        return layer.skip_scale if learns_skip else None, layer.branch_scale if self.learns_branch_scale else None

    def scale_shape(self, i: int) -> tuple[int, ...]:
        """Of a learned a."""
        return (self.sizes[i + 1],) if self.learns_branch_scale == "channel" else ()

    def runs(self) -> list[range]:
        """Neighbouring layers [d, d] alike but for their numbers, together; every other layer by itself."""

        def kind(i: int) -> tuple:
            (K, N), layer = self.pairs[i], self.layers[i]
            return (K, layer.skip, layer.activation) if K == N else (i,)

        groups = [list(run) for _, run in groupby(range(len(self.layers)), kind)]
        return [range(run[0], run[-1] + 1) for run in groups]


def described(sizes: Sequence[int], options: dict[str, Any]) -> Recipe:
    """The recipe of a stack of these sizes; options are of those in OPTIONS.

    Raises:
        TypeError, ValueError: a size or an option is unknown, out of range, or makes no sense with another.
    """
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise TypeError(f"options of a stack are {', '.join(OPTIONS)}, got {', '.join(unknown)}")
    given = {name: value for name, value in options.items() if value != OPTIONS[name]}
    options = OPTIONS | options
    widths = _sizes(sizes)
    depth = len(widths) - 1
    checks.learned_scales(options["learn_skip_scale"], options["learn_branch_scale"])
    if options["last_activation"] not in ("same", "none"):
        raise ValueError(f"last_activation must be 'same' or 'none', got {options['last_activation']!r}")
    lams, scales = (per(depth, name, options[name], "one for every layer") for name in ("skip_scale", "branch_scale"))
    drops = per(depth, "drop_path", options["drop_path"], "one for every layer")
    is_one_drop = not isinstance(options["drop_path"], Iterable)

    layers = []
    for i, (K, N) in enumerate(pairwise(widths)):
        is_linear = i == depth - 1 and options["last_activation"] == "none"
        phi, approximate = ("none", "none") if is_linear else (options["activation"], options["approximate"])
        with naming(i):
            skip = _skip(options["skip"], K, N)
            drop = 0.0 if is_one_drop and skip == "none" else drops[i]
            numbers = (lams[i], scales[i], drop)
            layers.append(checks.layer_spec(phi, approximate, options["order"], skip, *numbers, True, False))
    has_skip = any(layer.skip != "none" for layer in layers)
    if options["learn_skip_scale"] and not has_skip:
        raise ValueError("a learned skip_scale needs a skip, and no layer of these sizes has one")
    if is_one_drop and not has_skip:  # what no layer has looked at
        checks.layer_spec("none", "none", "pre", "none", 1.0, 1.0, options["drop_path"], True, False)
    return Recipe(widths, tuple(layers), options["learn_skip_scale"], options["learn_branch_scale"], given)


def _sizes(sizes: Any) -> tuple[int, ...]:
    if isinstance(sizes, str | Tensor) or not isinstance(sizes, Iterable):
        raise TypeError(f"sizes must be a sequence of integers, d₀ to d_L of L layers, got {type(sizes).__name__}")
    values = list(sizes)
    if len(values) < 2:
        raise ValueError(f"sizes must be two at least, one layer's input and output, got {values}")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"sizes[{i}] must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"sizes[{i}] must be at least 1, got {value}")
    return tuple(int(value) for value in values)


def _skip(skip: str | None, K: int, N: int) -> str:
    if skip == "concat":
        raise ValueError(
            "skip='concat' makes every layer wider than its size says: build it of FusedResidualLinear; "
            "a stack takes 'auto', 'identity', 'projection' or None"
        )
    if skip == "projection":
        return "identity" if K == N else "projection"
    return checks.resolve_skip(skip, K, N, False, False)
