"""How a run's time is dealt out: what a row may take, what is left of the total, and how long the rest will be."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_GUESS_S = {"compile": 0.5, "compile-autotuned": 1.0}  # a layer, before any was compiled
MARGIN_S = {"compile": 5.0, "compile-autotuned": 20.0}  # left to the rows' times: autotuning yields first
SHARE = {"compile": 0.6, "compile-autotuned": 0.3}  # of the total, that may be spent on it


class Pace:
    """Seconds of a whole run, and of each row's rounds and compilations.

    budget_s: of rounds, a row. first_call_s: {way: limit of a compilation, 0 for none}. total_s: no row begins later.
    """

    def __init__(
        self,
        budget_s: float,
        first_call_s: dict[str, float],
        total_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.budget_s, self.first_call_s, self.total_s = budget_s, first_call_s, total_s
        self._clock = clock
        self._start = clock()
        self._rate_s = dict(FIRST_GUESS_S)  # of compiling, a layer: the slowest so far
        self._spent_s = dict.fromkeys(FIRST_GUESS_S, 0.0)
        self._took_s: list[float] = []

    @property
    def left_s(self) -> float:
        return float("inf") if self.total_s is None else self.total_s - (self._clock() - self._start)

    def why_not_compiled(self, way: str, depth: int) -> str | None:
        """A reason to leave a compilation of so many layers out, where there is one."""
        if self.first_call_s[way] <= 0:
            return f"not compiled in {self.first_call_s[way]:g} s"
        if self.total_s is None:
            return None
        needed_s = 1.5 * self._rate_s[way] * depth
        left_s = min(self.left_s - MARGIN_S[way], SHARE[way] * self.total_s - self._spent_s[way])
        return (
            None if needed_s <= left_s else f"left out: {max(left_s, 0):.0f} s left for it, about {needed_s:.0f} needed"
        )

    def compiled(self, way: str, depth: int, seconds: float) -> None:
        self._rate_s[way] = max(self._rate_s[way], seconds / depth)
        self._spent_s[way] += seconds

    def measured(self, seconds: float) -> None:
        """A row took so long."""
        self._took_s.append(seconds)

    def outlook(self, place: int, count: int) -> str:
        """3 of 40, about 12 min left."""
        if not self._took_s:
            return f"{place} of {count}"
        left_s = min(self.left_s, (count - place) * sum(self._took_s) / len(self._took_s))
        return (
            f"{place} of {count}, about {left_s / 60:.0f} min left"
            if left_s >= 90
            else (f"{place} of {count}, about {max(left_s, 0):.0f} s left")
        )
