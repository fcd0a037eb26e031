"""A program of a user's, for an installed fusedres: a layer and a network, forward and backward, as eager has them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedres
from fusedres import FusedResidualLinear, FusedResidualStack, compare_gradients, explain


class Eager(nn.Linear):
    """x + gelu(x Wᵀ + b)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.gelu(super().forward(x))


def main() -> int:
    if not Path(fusedres.__file__).is_relative_to(sys.prefix):
        print(f"this is another fusedres, {fusedres.__file__}")
        return 1
    torch.manual_seed(0)
    layer, eager = FusedResidualLinear(32), Eager(32, 32)
    eager.load_state_dict(layer.state_dict())
    stack = FusedResidualStack([32] * 8 + [4])
    wrong = 0
    for fused, twin in ((layer, eager), (stack, stack.to_eager())):
        x = torch.randn(64, 32)
        torch.testing.assert_close(fused(x), twin(x))
        compared = compare_gradients(fused, twin, x)
        ran = {call.backend for call in explain(fused, x)}
        print(f"{type(fused).__name__}: gradients {'agree' if compared.agrees else compared.table()}")
        wrong += not compared.agrees or ran != {"native"}
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
