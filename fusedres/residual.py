"""A residual around any block, with its sum and the sum's gradients in one pass each."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from . import checks, functional


class Residual(nn.Module):
    """y = a block(x) + λ x, for any block that keeps its input's shape. x [...] -> [...].

    Parameters: `block.*`; `skip_scale` [] and `branch_scale` [] or [channels] where learned, else numbers. With
    branch_scale=0.0 and learn_branch_scale=True it starts as the identity.

    Args:
        block: whatever is called with x and gives a tensor of x's shape.
        skip_scale: λ, or where it starts when learned.
        learn_skip_scale: λ is a parameter.
        branch_scale: a, or where it starts when learned.
        learn_branch_scale: a is a parameter: True or "scalar", or "channel" for one per channel.
        channels: how many channels there are, with "channel".
        channel_dim: the dimension of x that counts them.
        drop_path: the probability that a sample's branch is dropped, in training mode. A sample is an index of x's
            first dimension, whatever the others are; the block is called with all of them.
        device: of the scales, where learned.
        dtype: of the scales, where learned.

    Raises:
        TypeError: block cannot be called, or a number is none.
        ValueError: an option is unknown, out of range, or makes no sense with another.
    """

    resolved_skip = "identity"  # what readouts call the skip it takes

    def __init__(
        self,
        block: nn.Module,
        *,
        skip_scale: float = 1.0,
        learn_skip_scale: bool = False,
        branch_scale: float = 1.0,
        learn_branch_scale: bool | str = False,
        channels: int | None = None,
        channel_dim: int = -1,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = "scalar" if learn_branch_scale is True else learn_branch_scale
        checks.residual_options(
            block, skip_scale, learn_skip_scale, branch_scale, kind, channels, channel_dim, drop_path
        )
        self.block = block
        self.channel_dim = channel_dim
        self.drop_path = drop_path

        def scale(start: float, is_learned: bool, *shape: int) -> nn.Parameter | float:
            return (
                nn.Parameter(torch.full(shape, float(start), device=device, dtype=dtype))
                if is_learned
                else float(start)
            )

        self.skip_scale = scale(skip_scale, learn_skip_scale)
        self.branch_scale = scale(branch_scale, bool(kind), *([cast(int, channels)] if kind == "channel" else []))
        self._initial_scales = (float(skip_scale), float(branch_scale))

    def reset_parameters(self) -> None:
        """The scales start where they were told to; the block's parameters stay."""
        for scale, start in zip((self.skip_scale, self.branch_scale), self._initial_scales, strict=True):
            if isinstance(scale, Tensor):
                nn.init.constant_(scale, start)

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> [...]. ValueError where the block changes the shape."""
        branch = self.block(x)
        return functional.residual(
            branch,
            x,
            skip_scale=self.skip_scale,
            branch_scale=self.branch_scale,
            channel_dim=self.channel_dim,
            drop_path=self.drop_path,
            training=self.training,
        )

    if TYPE_CHECKING:  # nn.Module says Any

        def __call__(self, x: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        parts = []
        for name, start in zip(("skip_scale", "branch_scale"), self._initial_scales, strict=True):
            scale = getattr(self, name)
            if isinstance(scale, Tensor):
                channels = f" of {scale.shape[0]} at dimension {self.channel_dim}" if scale.dim() else ""
                parts.append(f"{name}: learned from {start}{channels}")
            elif scale != 1.0:
                parts.append(f"{name}={scale}")
        return ", ".join(parts + ([f"drop_path={self.drop_path}"] if self.drop_path else []))
