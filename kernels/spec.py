"""What one residual layer is, as values: its tensors (`Operands`) and its options (`LayerSpec`).

The lowest floor: the kernels, the reference and the dispatcher all speak these two.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh", "sin", "none")


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
