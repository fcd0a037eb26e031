"""What is known of one gradient: how large its numbers are, and by which way they came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..kernels import record

SMALLEST_OCTAVE = -record.EXPONENT_BIAS  # of numbers below 2^-126, which have one bin


@dataclass(frozen=True)
class Statistics:
    """Of the numbers of a gradient. Means and the largest are over those that are finite, NaN where none is.

    Attributes:
        count: how many numbers there are.
        mean_abs: mean |g|.
        rms: their root mean square.
        max_abs: the largest |g|.
        zero: the fraction of those that are 0.
        non_finite: the fraction of those that are infinite or NaN.
        octaves: how many there are with 2^e <= |g| < 2^(e + 1), by e from -126 to 127, as float32 has them; -127 for
            all that are smaller and not 0, and 127 for all that are larger too.
    """

    count: int
    mean_abs: float
    rms: float
    max_abs: float
    zero: float
    non_finite: float
    octaves: dict[int, int]

    @property
    def norm(self) -> float:
        """The L2 norm, of the finite ones."""
        return self.rms * math.sqrt(self.count * (1 - self.non_finite))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"octaves": {str(e): count for e, count in self.octaves.items()}}


class Halves(NamedTuple):
    """The gradient at a layer's input is a sum: what came through its branch, dz W, and what through its skip, λ ∂L/∂y.

    Of a module that says nothing of skips the branch is the module, and the skip whatever goes past it: x in x + f(x),
    but of q, k and v on one input the other two as well.

    Attributes:
        branch: the L2 norm of the one.
        skip: of the other.
        cosine: between them: 1 where they add up, -1 where they cancel, NaN where one of them is 0.
    """

    branch: float
    skip: float
    cosine: float


class InputGradient(NamedTuple):
    """∂L/∂x of a layer.

    Attributes:
        statistics: of its numbers.
        halves: None where nothing goes past the branch.
        identity_path: in a stack, the norm of Π λ ∂L/∂x_L, what would come down through skips alone from where the
            equal widths end; None where no path of skips leads there.
    """

    statistics: Statistics
    halves: Halves | None = None
    identity_path: float | None = None

    def to_dict(self) -> dict[str, Any]:
        halves = None if self.halves is None else self.halves._asdict()
        return self.statistics.to_dict() | {"halves": halves, "identity_path": self.identity_path}


class Rows(NamedTuple):
    """Rows that are added up (`kernels/record.py`), on the CPU and without the exponents that no number has."""

    numbers: Tensor  # [n, OCTAVES]
    places: Tensor  # [m, 2]: row, exponent
    counts: Tensor  # [m]

    @classmethod
    def of(cls, rows: Tensor) -> Rows:
        """Of rows [n, ROW]; a copy."""
        bins = rows[:, record.OCTAVES :]
        places = bins.nonzero()
        return cls(rows[:, : record.OCTAVES].clone(), places, bins[places[:, 0], places[:, 1]])


def statistics_of(rows: Rows) -> list[Statistics]:
    """What the rows say, one by one."""
    octaves: list[dict[int, int]] = [{} for _ in range(len(rows.numbers))]
    for (i, e), n in zip(rows.places.tolist(), rows.counts.tolist(), strict=True):
        octaves[i][e] = int(n)
    return [_statistics(row, found) for row, found in zip(rows.numbers.tolist(), octaves, strict=True)]


def _statistics(row: Sequence[float], bins: dict[int, int]) -> Statistics:
    count, zeros, non_finite = row[record.COUNT], row[record.ZEROS], bins.pop(record.NOT_FINITE, 0)
    finite = count - non_finite or (math.nan if count else 1.0)
    smallest = bins.pop(0, 0) - int(zeros)  # 0 has no exponent either
    octaves = {SMALLEST_OCTAVE: smallest} if smallest else {}
    return Statistics(
        count=int(count),
        mean_abs=row[record.SUM] / finite,
        rms=math.sqrt(row[record.SQUARES] / finite),
        max_abs=row[record.LARGEST] if finite > 0 else math.nan,
        zero=zeros / max(count, 1.0),
        non_finite=non_finite / max(count, 1.0),
        octaves=octaves | {e - record.EXPONENT_BIAS: n for e, n in bins.items()},
    )


def halves_of(row: Sequence[float]) -> Halves | None:
    """None where there was one way alone."""
    branch, skip = math.sqrt(row[record.BRANCH]), math.sqrt(row[record.SKIP])
    if skip == 0:
        return None
    cosine = row[record.PRODUCT] / (branch * skip) if branch > 0 else math.nan
    return Halves(branch, skip, max(-1.0, min(1.0, cosine)) if branch > 0 else cosine)
