"""What a residual layer and a network of them are, as values: tensors (`Operands`) and options (`LayerSpec`).

The lowest floor: the kernels, the reference and the dispatcher all speak these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh", "sin", "none")
ORDERS = ("pre", "post")
SUMMED_SKIPS = ("none", "identity", "residual", "projection")  # concat puts skip and branch side by side instead
WAYS = ("lanes", "dots", "blocks", "layers")  # in which the CPU engine cuts its work
PER = ("all", "stretch", "column")  # what has a branch scale of its own in a View


class Operands(NamedTuple):
    """x [..., K], weight [N, K], bias [N], residual [..., N] (with concat [..., S], any S), projection_weight [N, K],
    projection_bias [N], skip_scale [], branch_scale [] or [N], seed [] int64 on the CPU."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    projection_weight: Tensor | None = None
    projection_bias: Tensor | None = None
    skip_scale: Tensor | None = None
    branch_scale: Tensor | None = None
    seed: Tensor | None = None

    @property
    def keeps_slope(self) -> bool:
        """Whether φ' is what Triton's forward keeps for backward; for a learned a it is z, which gives φ(z) too."""
        return self.branch_scale is None

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of what Triton's forward keeps: x's, but float16 for a slope of 16 bits, the finer one between -2 and 2."""
        return torch.float16 if self.keeps_slope and self.x.dtype.itemsize == 2 else self.x.dtype


class LayerSpec(NamedTuple):
    """The options of a layer, validated. A number stands where a scale is not learned."""

    activation: str = "gelu"  # one of ACTIVATIONS
    order: str = "pre"  # pre: λ s + a φ(z)    post: φ(λ s + a z)
    skip: str = "none"  # none, identity, residual, projection, concat
    skip_scale: float = 1.0
    branch_scale: float = 1.0
    drop_path: float = 0.0  # probability that a row loses its branch
    recompute: bool = False  # backward recomputes z instead of keeping it
    batch_invariant: bool = False  # one tile class, whatever the number of rows
    watch: int = 0  # the number by which its gradient is recorded (`fusedres/recording.py`); 0: it is not

    @property
    def activates_sum(self) -> bool:
        """Whether a slope stands between y and the sum of skip and branch."""
        return self.order == "post" and self.activation != "none"

    @property
    def drop_threshold(self) -> int:
        """The integer below which a 32-bit word drops its row."""
        return round(self.drop_path * 2**32)

    @property
    def keep_scale(self) -> float:
        return 1 / (1 - self.drop_path)


class Wanted(NamedTuple):
    """Which operands a backward is asked to differentiate."""

    x: bool
    weight: bool
    bias: bool
    residual: bool
    projection_weight: bool
    projection_bias: bool
    skip_scale: bool
    branch_scale: bool


class Gradients(NamedTuple):
    """The gradient of each operand, shaped and typed like it; None where it was not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    projection_weight: Tensor | None
    projection_bias: Tensor | None
    skip_scale: Tensor | None
    branch_scale: Tensor | None


class Terms(NamedTuple):
    """Of y = a drop(branch) + λ x: branch, x [...] of one shape; branch_scale [], or [C, 1, …] to broadcast with them;
    skip_scale []; seed [] int64 on the CPU. Options are a `LayerSpec` of skip "residual" and activation "none"."""

    branch: Tensor
    x: Tensor
    branch_scale: Tensor | None = None
    skip_scale: Tensor | None = None
    seed: Tensor | None = None


class WantedTerms(NamedTuple):
    """Which of the terms a backward is asked to differentiate."""

    branch: bool
    x: bool
    branch_scale: bool
    skip_scale: bool


class View(NamedTuple):
    """Dense memory as `stretches` of `length` numbers each, of which stretches / samples in a row make a sample.

    A branch scale is one for all; or [channels], of every stretch in turn, or of the columns of a stretch's rows.
    """

    stretches: int
    length: int
    samples: int
    channels: int
    per: int  # index in PER


class Slots(NamedTuple):
    """Where among a network's parameters a layer's tensors stand; -1 for one that it has not."""

    weight: int
    bias: int = -1
    projection_weight: int = -1
    projection_bias: int = -1
    skip_scale: int = -1
    branch_scale: int = -1


Own = Sequence[Tensor | None]  # a layer's tensors, in the order of Slots


class NetworkLayer(NamedTuple):
    """One layer x [..., K] -> [..., N] of a network, its skip none, identity or projection."""

    spec: LayerSpec
    N: int
    K: int
    slots: Slots
    slice: int = -1  # which slice of its tensors is this layer's, where they are stacked

    @property
    def run_kind(self) -> tuple | None:
        """What the layers of a run share, one after another; None where this can be in none."""
        if self.slice < 0 or self.N != self.K or self.spec.skip == "projection":
            return None
        return (self.slots, self.spec.activation, self.spec.order, self.spec.skip)

    def operands(self, x: Tensor, own: Own, seed: Tensor | None = None) -> Operands:
        weight, bias, projection_weight, projection_bias, skip_scale, branch_scale = own
        return Operands(x, weight, bias, None, projection_weight, projection_bias, skip_scale, branch_scale, seed)


class NetworkSpec:
    """The layers of a network in order. A value: equal layers, equal networks; its hash is computed once."""

    __slots__ = ("_hash", "_is_run", "_plan", "layers", "widths")

    def __init__(self, layers: Sequence[NetworkLayer]) -> None:
        self.layers = tuple(layers)
        self.widths = (self.layers[0].K, *(layer.N for layer in self.layers))  # d₀, …, d_L
        self._hash: int | None = None
        self._is_run: bool | None = None
        self._plan: Tensor | None = None  # kernels/cpu/plan.py makes it once

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(self.layers)
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, NetworkSpec) and self.layers == other.layers)

    def __reduce__(self) -> tuple:
        return NetworkSpec, (self.layers,)

    @property
    def is_run(self) -> bool:
        """Whether it is what `Run` describes, its parameters stacked."""
        if self._is_run is None:
            kind = self.layers[0].run_kind
            alike = all(layer.run_kind == kind and layer.slice == i for i, layer in enumerate(self.layers))
            self._is_run = kind is not None and alike
        return self._is_run

    def tensors(self, parameters: Sequence[Tensor]) -> list[Own]:
        """Every layer's own. A stack is taken apart once: L indexings would have L gradients of its size."""
        parts: dict[int, Sequence[Tensor]] = {}

        def part(layer: NetworkLayer, name: str, slot: int) -> Tensor | None:
            if slot < 0 or layer.slice < 0:
                return None if slot < 0 else parameters[slot]
            if slot not in parts:
                stack, depth = parameters[slot], parameters[layer.slots.weight].shape[0]
                is_matrix_or_number = name == "weight" or (name.endswith("scale") and stack.numel() == depth)
                parts[slot] = (stack if is_matrix_or_number else stack.reshape(depth, -1)).unbind(0)
            return parts[slot][layer.slice]

        return [[part(layer, *named) for named in layer.slots._asdict().items()] for layer in self.layers]

    @property
    def dropping(self) -> list[int]:
        """The layers that drop rows while training."""
        return [i for i, layer in enumerate(self.layers) if layer.spec.drop_path > 0]


class Run(NamedTuple):
    """L layers in a row of equal width d and of one kind, their skip identity or none.

    weight [L, d, d], bias [L, d]. Scales are one number for all layers, or [L]; branch_scale [L, d] too. Where rows are
    dropped, seeds [L] int64; threshold and keep_scale as `LayerSpec` has them, or [L] int64 and [L]. All on one device.
    """

    weight: Tensor
    bias: Tensor | None = None
    skip_scale: Tensor | float = 1.0
    branch_scale: Tensor | float = 1.0
    seeds: Tensor | None = None
    threshold: Tensor | int = 0
    keep_scale: Tensor | float = 1.0
    activation: str = "gelu"
    order: str = "pre"
    has_skip: bool = True

    def layers(self, first: int, last: int) -> Run:
        """Layers first, …, last - 1."""
        parts: dict[str, Any] = {k: v[first:last] for k, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**parts)
