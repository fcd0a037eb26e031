"""What is recorded of a gradient: a row of numbers, which kernels leave in parts and others add up.

    COUNT           how many numbers
    SUM, SQUARES    Σ|g|, Σ g², over those that are finite, as the rest is
    LARGEST         max |g|
    ZEROS           how many are 0
    BRANCH, SKIP    Σ b², Σ s² of its two halves, g = b + s: through the branch, dz W, and through the skip, λ ∂L/∂y
    PRODUCT         Σ b s
    SCALE           of a part: sums are of numbers divided by it, and of their squares, lest these vanish; 2^k
    OCTAVES + e     how many have a float32's exponent e: 2^(e - 127) <= |g| < 2^(e - 126); 0: smaller; 255: not finite

Parts of one gradient are [parts, ROW]; the largest of LARGEST counts, and of all else the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

COUNT, SUM, SQUARES, LARGEST, ZEROS, BRANCH, SKIP, PRODUCT, SCALE = range(9)
OCTAVES, ROW = 16, 16 + 256
EXPONENT_BIAS, NOT_FINITE = 127, 255


class Recording(NamedTuple):
    """What a backward is to record: gradients times `unscale`, a number or a tensor [], for rows from `row` on."""

    unscale: float | Tensor
    into: Callable[[int, Tensor], None]
    row: int

    def note(self, parts: Tensor) -> None:
        """Leaves parts [parts, layers, ROW] to whoever asked."""
        self.into(self.row, parts)

    def from_layer(self, layer: int) -> Recording:
        """For the layers of a network from this one on."""
        return self._replace(row=self.row + layer)
