"""A network's description as checked values; every error is a layer's (`checks`), with the layer's index before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from . import checks
from .kernels.spec import NetworkLayer, NetworkSpec, Slots


class Entry(NamedTuple):
    """What stands at one place of a description: one layer, or a stacked run of layers."""

    weight: Tensor  # [N, K], or [L, N, N]
    bias: Tensor | None
    projection_weight: Tensor | None
    projection_bias: Tensor | None
    skip: str | None
    skip_scale: float | Tensor | Sequence[float]  # of a run, also a number for every layer
    branch_scale: float | Tensor | Sequence[float]


def described(
    weights: Any,
    biases: Any,
    projection_weights: Any,
    projection_biases: Any,
    skip: Any,
    skip_scale: Any,
    branch_scale: Any,
    options: tuple[Any, ...],
) -> tuple[NetworkSpec, tuple[Tensor, ...]]:
    """The layers, and the tensor of every slot: one that several layers share stands there several times.

    Options are (activation, approximate, order, last_activation, drop_path, recompute).

    Raises:
        TypeError, ValueError: a layer's operands or options do not fit, or there are too few or too many of them.
    """
    activation, approximate, order, last_activation, drop_path, recompute = options
    if last_activation not in ("same", "none"):
        raise ValueError(f"last_activation must be 'same' or 'none', got {last_activation!r}")
    if not isinstance(recompute, bool) and recompute != "auto":
        raise ValueError(f"recompute must be True, False or 'auto', got {recompute!r}")
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    if not weights:
        raise ValueError("weights must be one tensor at least, got none")
    parts = {
        "biases": biases,
        "projection_weights": projection_weights,
        "projection_biases": projection_biases,
        "skip": skip,
        "skip_scale": skip_scale,
        "branch_scale": branch_scale,
    }
    columns = [per(len(weights), name, value, "one for every entry of weights") for name, value in parts.items()]
    entries = [Entry(*row) for row in zip(weights, *columns, strict=True)]
    depths: list[int] = []
    for entry in entries:
        depths.append(_depth(entry, sum(depths)))
    depth = sum(depths)
    drops = per(depth, "drop_path", drop_path, "one for every layer")

    layers: list[NetworkLayer] = []
    tensors: list[Tensor] = []
    for entry, run in zip(entries, depths, strict=True):
        for at in range(run):
            i = len(layers)
            phi = ("none", "none") if i == depth - 1 and last_activation == "none" else (activation, approximate)
            with naming(i):
                slots = _slots(entry, tensors) if at == 0 else layers[-1].slots
                more = (*phi, order, drops[i], recompute is True)
                layers.append(_layer(entry, at, slots, more, tensors, layers))
    return NetworkSpec(layers), tuple(tensors)


def check(x: Tensor, spec: NetworkSpec, tensors: Sequence[Tensor], is_autocast: bool) -> None:
    """Raises TypeError or ValueError where x does not fit, or a tensor no longer does."""
    check_input(x, spec.widths[0])
    depths = {layer.slots.weight: layer.slice + 1 for layer in spec.layers if layer.slice >= 0}  # the last one's stays
    for slot, depth in depths.items():
        if tensors[slot].dim() != 3 or tensors[slot].shape[0] != depth:
            raise ValueError(
                f"a stacked weight must stay that of {depth} layers, got shape {list(tensors[slot].shape)}"
            )
    for i, (layer, own) in enumerate(zip(spec.layers, spec.tensors(tensors), strict=True)):
        with naming(i):
            given = layer.operands(x.new_empty(1, layer.K), own)
            if list(given.weight.shape) != [layer.N, layer.K]:
                raise ValueError(f"weight must stay {[layer.N, layer.K]}, got shape {list(given.weight.shape)}")
            checks.operands(given, layer.spec, is_autocast)


def check_input(x: Any, K: int) -> None:
    """Raises TypeError or ValueError for anything but a floating-point tensor [..., K]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating-point dtype, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., {K}], the in_features of the first layer, got shape {list(x.shape)}")


def per(count: int, name: str, value: Any, what: str) -> list[Any]:
    """The values one by one: those of a sequence, or the same for all."""
    if value is None or isinstance(value, str | Tensor) or not isinstance(value, Iterable):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise ValueError(f"{name} must be {count} values, {what}, got {len(values)}")
    return values


def _depth(entry: Entry, first: int) -> int:
    """How many layers an entry stands for."""
    weight = entry.weight
    with naming(first):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
        if weight.dim() != 3:
            return 1  # a wrong number of dimensions is told with the rest of the layer
        L, N, K = weight.shape
        if L == 0 or (L > 1 and N != K):
            raise ValueError(
                f"a stacked weight must be [layers, features, features], each layer's output being the next one's "
                f"input, got shape {list(weight.shape)}"
            )
        return L


def _slots(entry: Entry, tensors: list[Tensor]) -> Slots:
    """Appends the entry's tensors to those of the network, and says where they stand."""
    bias, skip_scale, branch_scale = entry.bias, entry.skip_scale, entry.branch_scale
    found: list[int] = []
    values = (entry.weight, bias, entry.projection_weight, entry.projection_bias, skip_scale, branch_scale)
    for name, value in zip(Slots._fields, values, strict=True):
        is_number = name.endswith("scale") and not isinstance(value, Tensor)
        if value is None or is_number:
            found.append(-1)
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        found.append(len(tensors))
        tensors.append(value)
    return Slots(*found)


def _layer(
    entry: Entry, at: int, slots: Slots, options: tuple[Any, ...], tensors: list[Tensor], before: list[NetworkLayer]
) -> NetworkLayer:
    """The layer at a place of its entry, which is checked at the first one."""
    weight, is_stacked = entry.weight, entry.weight.dim() == 3
    activation, approximate, order, drop_path, recompute = options
    if at == 0:
        if not is_stacked:
            checks.matrices(_stand_in(tensors, weight.shape[-1] if weight.dim() else 0), weight)
        if before and weight.shape[-1] != before[-1].N:
            raise ValueError(
                f"weight must be [..., {before[-1].N}], which the layer before puts out, got shape {list(weight.shape)}"
            )
        if entry.skip == "concat":
            raise ValueError("skip='concat' is a single layer's: within a network use one of the other skips")
    N, K = weight.shape[-2:]
    kind = checks.resolve_skip(entry.skip, K, N, False, entry.projection_weight is not None)
    if at == 0 and is_stacked:
        _check_stacked(entry)
    lam, a = (_number(scale, at if is_stacked else -1) for scale in (entry.skip_scale, entry.branch_scale))
    spec = checks.layer_spec(activation, approximate, order, kind, lam, a, drop_path, True, recompute)
    layer = NetworkLayer(spec, N, K, slots, at if is_stacked else -1)
    if at == 0:
        (own,) = NetworkSpec([layer]).tensors(tensors)
        checks.operands(layer.operands(_stand_in(tensors, K), own), spec, False, like="the first weight")
    return layer


def _number(scale: Any, at: int) -> Any:
    """The scale of the layer at a place of its run, 1 where it is a tensor's to say."""
    if isinstance(scale, Tensor):
        return 1.0
    return scale[at] if isinstance(scale, Sequence) and at >= 0 else scale


def _stand_in(tensors: list[Tensor], K: int) -> Tensor:
    """An x to check operands against before there is one."""
    return tensors[0].new_empty(1, K)


def _check_stacked(entry: Entry) -> None:
    L, N, _ = entry.weight.shape
    if entry.projection_weight is not None:
        raise ValueError("a stacked weight is square: its skip can be no projection; give such layers one by one")
    shapes = {
        "bias": (entry.bias, [[L, N], [L * N]]),
        "skip_scale": (entry.skip_scale, [[L]]),
        "branch_scale": (entry.branch_scale, [[L], [L, N], [L * N]]),
    }
    for name, (value, allowed) in shapes.items():
        if isinstance(value, Sequence) and len(value) != L:
            raise ValueError(f"{name} must be {L} values, one for every layer of the run, got {len(value)}")
        if isinstance(value, Tensor) and list(value.shape) not in allowed:
            raise ValueError(
                f"{name} must be {' or '.join(map(str, allowed))}, one for every layer of weight "
                f"{list(entry.weight.shape)}, got shape {list(value.shape)}"
            )


@contextmanager
def naming(i: int) -> Iterator[None]:
    """Errors within name the layer that they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {i}: {error}") from None
