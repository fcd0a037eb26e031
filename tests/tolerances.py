"""What counts as close: rules with names and reasons, in units of eager's own error against the truth in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Bounds on the largest and the root mean square error, as multiples of eager's."""

    max_error: float
    rms_error: float

    def check(self, name: str, fused: Tensor, eager: Tensor, truth: Tensor, terms: float = 1.0) -> None:
        """Fused is as close to truth as this rule asks. An entry of truth is like a sum of `terms` terms near one.

        Eager can be exact by luck, on one number above all, so it counts as wrong by at least one rounding of the
        largest value, and by √terms roundings of one: what its rounded terms add up to.
        """
        assert fused.shape == truth.shape, f"{name}: shape {list(fused.shape)}, expected {list(truth.shape)}"
        assert fused.dtype == eager.dtype, f"{name}: dtype {fused.dtype}, eager gives {eager.dtype}"
        if truth.numel() == 0:
            return
        assert torch.isfinite(fused).all(), f"{name}: not finite"
        rounding = torch.finfo(eager.dtype).eps * truth.abs().max().clamp_min(terms**0.5)
        ours, theirs = (fused.double() - truth).abs(), (eager.double() - truth).abs()
        worst, allowed = ours.max(), self.max_error * torch.maximum(theirs.max(), rounding)
        assert worst <= allowed, f"{name}: largest error {worst:.3g}, allowed {allowed:.3g}"
        if truth.numel() >= 16:  # fewer numbers have no mean to speak of: the largest error speaks for them
            # a rounding's rms is 0.29 of its largest; two samples of n roundings of one kind differ in rms by 3 / √(2n)
            # three times in a thousand
            chance = 1 + 3 * (2 * truth.numel()) ** -0.5
            rms, rms_allowed = _rms(ours), self.rms_error * chance * torch.maximum(_rms(theirs), 0.29 * rounding)
            assert rms <= rms_allowed, f"{name}: rms error {rms:.3g}, allowed {rms_allowed:.3g}"


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()


# Half precision: the fused kernel rounds an output once where eager rounds after every operation, so its mean error
# must not exceed eager's; the largest error, of few roundings at the worst place, may fall either way.
HALF = Rule(max_error=2.0, rms_error=1.0)

# Single precision: both round after every operation and sum products in different orders, neither the better one.
SINGLE = Rule(max_error=4.0, rms_error=2.0)

# A sum over rows in single precision: eager adds pairwise; the kernels first add the rows of a tile or block, one after
# the other in the interpreter and in C++: k terms near one then err by about k eps / √8, three times √k eps at k = 64.
SINGLE_SUM = Rule(max_error=8.0, rms_error=6.0)

# Double precision: the truth is itself rounded as eager is, so that eager's own error comes on top. A weight's gradient
# is a sum over rows here too: of 512 rows PyTorch's, the truth, was 6 times as far from 40 digits as ours.
DOUBLE, DOUBLE_SUM = Rule(max_error=5.0, rms_error=3.0), Rule(max_error=9.0, rms_error=7.0)

SUMS = ("dbias", "dprojection_bias", "dskip_scale", "dbranch_scale")


def rule_for(dtype: torch.dtype, name: str) -> Rule:
    """The rule for this output, or gradient d..., of a layer in this dtype."""
    if dtype == torch.float64:
        return DOUBLE_SUM if name in (*SUMS, "dweight", "dprojection_weight") else DOUBLE
    if dtype == torch.float32:
        return SINGLE_SUM if name in SUMS else SINGLE
    return HALF
