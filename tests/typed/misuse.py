"""What `mypy --strict` is to refuse, each line with the code of its error."""

from __future__ import annotations

from torch import randn

from fusedres import FusedResidualLinear, FusedResidualStack, Residual, explain, functional
from fusedres.modules import Tensor  # expected: attr-defined

x = randn(8, 16)

FusedResidualLinear(16, activaton="gelu")  # expected: call-arg
FusedResidualLinear("16")  # expected: arg-type
FusedResidualLinear(16)(3)  # expected: arg-type
FusedResidualLinear(16)(x, x, x)  # expected: call-arg
FusedResidualStack(16)  # expected: arg-type
FusedResidualStack([16, 16])([x])  # expected: arg-type
Residual(lambda x: x)  # expected: arg-type
functional.residual_linear(x, [16, 16])  # expected: arg-type
explain(FusedResidualLinear(16), x)[0].choice.reason  # expected: union-attr
FusedResidualLinear(16).projection.weight  # expected: union-attr
y: str = FusedResidualLinear(16)(x)  # expected: assignment
