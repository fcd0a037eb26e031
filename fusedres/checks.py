"""Every error a caller can make, in the caller's words: what was expected, from where, and what came."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .kernels.spec import ACTIVATIONS, LayerSpec, Operands, Terms

ACTIVATION_NAMES = tuple(name for name in ACTIVATIONS if name != "gelu_tanh")
SKIPS = ("auto", "identity", "projection", "concat", None)


def described(
    given: Operands,
    skip_scale: float | Tensor,
    branch_scale: float | Tensor,
    options: tuple[Any, ...],
    is_autocast: bool,
) -> tuple[Operands, LayerSpec]:
    """A call's arguments as checked values; a tensor for a scale is a learned one.

    Options are (activation, approximate, order, skip, drop_path, training, recompute).

    Raises:
        TypeError: an operand is no floating-point tensor or of another dtype than x, or a number is none.
        ValueError: a shape or a device does not fit; an option is unknown, out of range, or at odds with another.
    """
    activation, approximate, order, skip, drop_path, training, recompute = options
    matrices(given.x, given.weight)
    N, K = given.weight.shape
    kind = resolve_skip(skip, K, N, given.residual is not None, given.projection_weight is not None)
    if isinstance(skip_scale, Tensor):
        given, skip_scale = given._replace(skip_scale=skip_scale), 1.0
    if isinstance(branch_scale, Tensor):
        given, branch_scale = given._replace(branch_scale=branch_scale), 1.0
    spec = layer_spec(activation, approximate, order, kind, skip_scale, branch_scale, drop_path, training, recompute)
    operands(given, spec, is_autocast)
    return given, spec


def facts(
    given: Operands, skip_scale: float | Tensor, branch_scale: float | Tensor, options: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """All that decides what `described` makes of a plain call, one of x, weight and bias; None for other calls.

    Equal facts are equal calls: a layer is checked once, not every time.
    """
    x, weight, bias, residual, projection_weight, projection_bias, _, _, _ = given
    is_plain = residual is projection_weight is projection_bias is None
    is_plain = is_plain and type(skip_scale) is type(branch_scale) is type(options[4]) is float  # True equals 1.0
    if not is_plain or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    try:
        about_weight = (weight.shape, weight.dtype, weight.device)
        about_bias = None if bias is None else (bias.shape, bias.dtype, bias.device)
        return skip_scale, branch_scale, options, x.size(-1), x.dtype, x.device, about_weight, about_bias
    except (AttributeError, IndexError):  # not a tensor, or one without dimensions: an error to be told
        return None


_KNOWN: dict[tuple[Any, ...], LayerSpec] = {}


def recall(about: tuple[Any, ...] | None) -> LayerSpec | None:
    """What `described` made of these facts, where it has met them."""
    try:
        return _KNOWN.get(about)
    except TypeError:  # a size that is traced cannot be hashed, nor can an option that is wrong
        return None


def remember(about: tuple[Any, ...] | None, spec: LayerSpec) -> None:
    if about is not None:
        with suppress(TypeError):
            if len(_KNOWN) >= 4096:
                _KNOWN.clear()
            _KNOWN[about] = spec


def layer_spec(
    activation: str,
    approximate: str,
    order: str,
    skip: str | None,
    skip_scale: float,
    branch_scale: float,
    drop_path: float,
    training: bool,
    recompute: bool,
) -> LayerSpec:
    """The validated options. `skip` is what `resolve_skip` returned.

    Raises:
        TypeError: drop_path, or a scale, is not a number.
        ValueError: an option is unknown, out of range, or makes no sense with another.
    """
    if activation not in ACTIVATION_NAMES:
        raise ValueError(f"activation must be one of {_list(ACTIVATION_NAMES)}, got {activation!r}")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    if approximate == "tanh" and activation != "gelu":
        raise ValueError(f"approximate='tanh' is an approximation of gelu, got activation={activation!r}")
    if order not in ("pre", "post"):
        raise ValueError(f"order must be 'pre' or 'post', got {order!r}")
    if order == "post" and skip == "concat":
        raise ValueError("order='post' activates a sum of skip and branch, and skip='concat' has none; use order='pre'")
    _check_drop_path(drop_path)
    if drop_path > 0 and skip == "none":
        raise ValueError(
            f"drop_path={drop_path} needs a skip: without one a dropped row would be lost; "
            "give the layer a skip, or drop_path=0"
        )
    return LayerSpec(
        activation="gelu_tanh" if approximate == "tanh" else activation,
        order=order,
        skip=skip,
        skip_scale=_number("skip_scale", skip_scale),
        branch_scale=_number("branch_scale", branch_scale),
        drop_path=float(drop_path) if training else 0.0,
        recompute=bool(recompute),
    )


def dropout(p: float) -> None:
    """Raises TypeError, ValueError for anything but a probability below one."""
    if not 0 <= _number("dropout", p) < 1:
        raise ValueError(f"dropout must be a probability in [0, 1), got {p}")


def _check_drop_path(drop_path: float) -> None:
    if not 0 <= _number("drop_path", drop_path) < 1:
        raise ValueError(f"drop_path must be a probability in [0, 1), got {drop_path}")


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def resolve_skip(
    skip: str | None, in_features: int, out_features: int, has_residual: bool, has_projection: bool
) -> str:
    """What `skip` means for these sizes and operands: none, identity, residual, projection or concat.

    Raises:
        ValueError: skip is unknown, asks for equal sizes that differ, or for operands other than those given.
    """
    if skip not in SKIPS:
        raise ValueError(f"skip must be one of {_list(SKIPS)}, got {skip!r}")
    if has_projection and (has_residual or skip not in ("auto", "projection")):
        other = "a residual" if has_residual else f"skip={skip!r}"
        raise ValueError(f"projection_weight is the skip of skip='projection' and cannot go with {other}")
    if has_residual and skip not in ("auto", "concat"):
        raise ValueError(f"residual is itself the skip: leave skip='auto' (or 'concat'), got skip={skip!r}")
    if skip == "projection" and not has_projection:
        raise ValueError("skip='projection' needs projection_weight [out_features, in_features], got None")
    if skip == "identity" and in_features != out_features:
        raise ValueError(
            f"skip='identity' adds the input to the output, so in_features and out_features must agree, "
            f"got {in_features} and {out_features}; use skip='projection', or skip='auto' for no skip here"
        )
    if skip == "auto":
        if has_residual:
            return "residual"
        if has_projection:
            return "projection"
        return "identity" if in_features == out_features else "none"
    return skip or "none"


def matrices(x: Tensor, weight: Tensor) -> None:
    """x [..., K] and weight [N, K], floating point.

    Raises:
        TypeError: one is not a floating-point tensor.
        ValueError: a shape does not fit.
    """
    _floating("x", x)
    _floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got shape {list(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., {weight.shape[1]}], the in_features of weight {list(weight.shape)}, "
            f"got shape {list(x.shape)}"
        )


def operands(given: Operands, spec: LayerSpec, is_autocast: bool, like: str = "x") -> None:
    """Everything beside x: shapes, devices and dtypes. Autocast casts the products' operands, so it admits any dtype.

    `like` is what errors call the tensor that dtype and device are x's from.

    Raises:
        TypeError: an operand is no tensor, or of another dtype than x.
        ValueError: a shape or a device does not fit, or a scale or bias belongs to a skip that is not there.
    """
    x, weight, bias, residual, projection_weight, projection_bias, skip_scale, branch_scale, _ = given
    N, K = weight.shape
    _tensor("weight", weight, [N, K], "", x, is_autocast, like)
    if bias is not None:
        _tensor("bias", bias, [N], "one per output feature", x, is_autocast, like)
    if residual is not None:
        is_free = spec.skip == "concat" and isinstance(residual, Tensor) and residual.dim() > 0
        width = residual.shape[-1] if is_free else N
        what = "the leading shape of x" if spec.skip == "concat" else "the shape of the output"
        _tensor("residual", residual, [*x.shape[:-1], width], what, x, is_autocast, like)
    if projection_weight is not None:
        _tensor("projection_weight", projection_weight, [N, K], "the shape of weight", x, is_autocast, like)
    if projection_bias is not None:
        if projection_weight is None:
            raise ValueError("projection_bias needs projection_weight, got None")
        _tensor("projection_bias", projection_bias, [N], "one per output feature", x, is_autocast, like)
    if skip_scale is not None:
        has_skip_to_scale(spec.skip)
        _tensor("skip_scale", skip_scale, [], "a learned scalar", x, is_autocast, like)
    if branch_scale is not None:
        shape = list(branch_scale.shape)
        if shape not in ([], [N]):
            raise ValueError(
                f"branch_scale must be [], one for all, or [{N}], one per output feature, got shape {shape}"
            )
        _tensor("branch_scale", branch_scale, shape, "", x, is_autocast, like)


def _tensor(name: str, value: Tensor, shape: list[int], what: str, x: Tensor, any_dtype: bool, like: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if list(value.shape) != shape:
        raise ValueError(f"{name} must be {shape}, {what}, got shape {list(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, where {like} is, got {value.device}")
    if value.dtype != x.dtype and not (any_dtype and value.is_floating_point()):
        raise TypeError(f"{name} must be {x.dtype}, the dtype of {like}, got {value.dtype}")


def described_sum(
    branch: Tensor,
    x: Tensor,
    skip_scale: float | Tensor,
    branch_scale: float | Tensor,
    channel_dim: int,
    drop_path: float,
    training: bool,
) -> tuple[Terms, LayerSpec]:
    """The arguments of `functional.residual` as checked values; a tensor for a scale is a learned one.

    Raises:
        TypeError: a term or a scale is no floating-point tensor, or a number is none.
        ValueError: a shape or a device does not fit, or an option is out of range.
    """
    for name, term in (("x", x), ("branch", branch)):
        _floating(name, term)
    if branch.shape != x.shape:
        raise ValueError(
            f"branch must be {list(x.shape)}, the shape of the block's input x, got shape {list(branch.shape)}"
        )
    terms = Terms(branch, x)
    if isinstance(skip_scale, Tensor):
        if skip_scale.dim() > 0:
            raise ValueError(f"skip_scale must be [], a learned scalar, got shape {list(skip_scale.shape)}")
        terms, skip_scale = terms._replace(skip_scale=skip_scale), 1.0
    if isinstance(branch_scale, Tensor):
        along = branch_scale if branch_scale.dim() == 0 else _along(channel_dim, branch_scale, x)
        terms, branch_scale = terms._replace(branch_scale=along), 1.0
    for name in ("branch", "branch_scale", "skip_scale"):
        value = getattr(terms, name)
        if value is None:
            continue
        _floating(name, value)
        if value.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, where x is, got {value.device}")
    if drop_path and training and x.dim() == 0:
        raise ValueError("drop_path drops samples, the first dimension of x, and x is []")
    return terms, layer_spec("none", "none", "pre", "residual", skip_scale, branch_scale, drop_path, training, False)


def residual_options(
    block: object,
    skip_scale: float,
    learn_skip_scale: bool,
    branch_scale: float,
    learn_branch_scale: bool | str,
    channels: int | None,
    channel_dim: int,
    drop_path: float,
) -> None:
    """The options of a `Residual`.

    Raises:
        TypeError: block cannot be called, or a number is none.
        ValueError: an option is unknown, out of range, or makes no sense with another.
    """
    if not callable(block) or isinstance(block, type):
        got = f"the class {block.__name__}" if isinstance(block, type) else type(block).__name__
        raise TypeError(f"block must be a torch.nn.Module, got {got}")
    learned_scales(learn_skip_scale, learn_branch_scale)
    layer_spec("none", "none", "pre", "residual", skip_scale, branch_scale, drop_path, True, False)
    for name, value in (("channels", channels), ("channel_dim", channel_dim)):
        if value is not None:
            _integer(name, value)
    if (learn_branch_scale == "channel") != (channels is not None):
        raise ValueError(
            "learn_branch_scale='channel' needs channels, how many x has at channel_dim, and nothing else takes them, "
            f"got learn_branch_scale={learn_branch_scale!r} and channels={channels}"
        )
    if channels is not None and channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")


def _floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, got {value.dtype}")


def _integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def _along(channel_dim: int, scale: Tensor, x: Tensor) -> Tensor:
    """A scale [C] as [C, 1, …], to multiply along a dimension of x."""
    _integer("channel_dim", channel_dim)
    dims = x.dim()
    if not -dims <= channel_dim < dims:
        raise ValueError(f"channel_dim must be one of the {dims} dimensions of x {list(x.shape)}, got {channel_dim}")
    axis = channel_dim % dims
    if list(scale.shape) != [x.shape[axis]]:
        raise ValueError(
            f"branch_scale must be [], one for all, or [{x.shape[axis]}], one per channel of x {list(x.shape)} at "
            f"dimension {channel_dim}, got shape {list(scale.shape)}"
        )
    return scale if axis == dims - 1 else scale.view(-1, *(1,) * (dims - 1 - axis))


def has_skip_to_scale(skip: str) -> None:
    """Raises ValueError where a learned skip scale would have no skip to scale, hence no gradient."""
    if skip == "none":
        raise ValueError("a learned skip_scale needs a skip, and this layer has none (sizes differ, or skip=None)")


def learned_scales(learn_skip_scale: bool, learn_branch_scale: bool | str) -> None:
    """Raises ValueError for anything but a bool, and False, "scalar" or "channel"."""
    if not isinstance(learn_skip_scale, bool):
        raise ValueError(f"learn_skip_scale must be True or False, got {learn_skip_scale!r}")
    if learn_branch_scale is not False and learn_branch_scale not in ("scalar", "channel"):
        raise ValueError(f"learn_branch_scale must be False, 'scalar' or 'channel', got {learn_branch_scale!r}")


def _list(values: tuple[str | None, ...]) -> str:
    return ", ".join(map(repr, values))
