"""One network, one pass, all its opponents: answers checked against float64, then times taken in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import opponents
import torch
from cpu_cases import Row
from opponents import COMPILED, Contender
from timing import in_turns


class Limits(NamedTuple):
    """Seconds: of rounds, and for the first call of each compilation; 0 leaves it out."""

    budget_s: float
    first_call_s: dict[str, float]  # by way


class Contest:
    """kind F: forward without gradients. FB: forward, mean squared error, backward to every parameter.

    The error and its backward are eager for everyone, and old gradients are let go in the measured call.
    """

    def __init__(self, row: Row, kind: str) -> None:
        self.row, self.kind = row, kind
        self.module, self.x, self.target = opponents.draw(row)
        self.contenders: dict[str, Contender] = {
            "eager": opponents.of_module(self.module),
            "fused": opponents.fused(self.module, row),
        }
        if row.can_stack:
            self.contenders["stacked"] = opponents.stacked(self.module, row)
        self.own = self._answer(self.contenders["eager"])
        self.exact = opponents.truth(self.module, row, kind, self.x, self.target)

    def _answer(self, contender: Contender) -> dict[str, torch.Tensor]:
        return contender.answer(self.kind, self.x, self.target)

    def errors(self, contender: Contender) -> dict[str, dict[str, float]]:
        return opponents.errors(self._answer(contender), self.own, self.exact, self.row.depth)

    def check_ours(self) -> dict[str, dict[str, float]]:
        """{way: its worst errors}, or an AssertionError that says which tensor is wrong, and by how much."""
        found = {way: self.errors(c) for way, c in self.contenders.items() if way != "eager"}
        for way, errors in found.items():
            wrong = opponents.wrong(errors)
            assert not wrong, f"{self.row} {self.kind}, {way}: " + "\n".join(wrong[:10])
        return {way: opponents.worst(errors) for way, errors in found.items()}

    def mode(self) -> AbstractContextManager[object]:
        """What the calls of this kind have to be made in."""
        return torch.no_grad() if self.kind == "F" else nullcontext()

    def call(self, way: str) -> Callable[[], object]:
        return self.contenders[way].call(self.kind, self.x, self.target)

    def measured(self, limits: Limits) -> dict[str, Any]:
        """A row of results: everybody's milliseconds, and the ratios of ours to them, to the floor and to the bar."""
        errors = self.check_ours()
        failures: dict[str, str] = {}  # who is not timed, and why
        remarks: dict[str, str] = {}  # who is timed though its answer is wrong
        first_call_s: dict[str, float] = {}
        torch._dynamo.reset()  # so that no row inherits another's graph; Inductor's cache on disk stays in use
        for way in COMPILED:
            begin = time.perf_counter()
            try:
                with opponents.time_limit(limits.first_call_s[way]):
                    contender = opponents.compiled(self.module, way)
                    found = self.errors(contender)
            except opponents.TooLong:
                failures[way] = f"not compiled in {limits.first_call_s[way]:g} s"
                opponents.abandon_compilation()
                continue
            except Exception as error:
                failures[way] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                continue
            first_call_s[way] = round(time.perf_counter() - begin, 2)
            errors[way] = opponents.worst(found)
            self.contenders[way] = contender
            if wrong := opponents.wrong(found):
                remarks[way] = f"wrong, and timed all the same: {wrong[0]}"
        del self.exact, self.own

        with self.mode():
            times = in_turns({way: self.call(way) for way in self.contenders}, limits.budget_s)
        return {
            **_facts(self.row, self.kind),
            "milliseconds": {way: {**t._asdict(), "spread": t.spread} for way, t in times.items()},
            **_ratios(self.row, self.kind, {way: t.median for way, t in times.items()}),
            "chosen": opponents.chosen(self.contenders["fused"].network, self.x).line,
            "errors_over_eager": errors,
            "first_call_s": first_call_s,
            "failures": failures,
            "remarks": remarks,
        }


def _facts(row: Row, kind: str) -> dict[str, Any]:
    return {
        "row": row.name,
        "pass": kind,
        "sizes": sizes_in_words(row.sizes),
        "M": row.M,
        "dtype": str(row.dtype).removeprefix("torch."),
        "learned": row.learns,
    }


def _ratios(row: Row, kind: str, medians: dict[str, float]) -> dict[str, Any]:
    """How many times as fast ours is as the others, and how many times the floor it takes."""
    compiled = [way for way in COMPILED if way in medians]
    best = min(compiled, key=medians.__getitem__, default=None)
    floor, bar = row.floor_ms(kind), row.bar.get(kind)
    found: dict[str, Any] = {"best_compile": best, "bar": bar, "floor_ms": floor}
    if floor is not None:
        found["floor_from"] = "stated" if kind in row.stated_floor_ms else "formula"
    for way in ("fused", "stacked"):
        if way not in medians:
            continue
        found[way] = {
            "over_eager": medians["eager"] / medians[way],
            "over_best_compile": None if best is None else medians[best] / medians[way],
            "over_floor": None if floor is None else medians[way] / floor,
        }
    has_both = bar is not None and best is not None
    found["is_met"] = found["fused"]["over_best_compile"] >= bar if has_both else None
    return found


def sizes_in_words(sizes: tuple[int, ...]) -> str:
    """3x13 1 for [3] * 13 + [1]."""
    words: list[list[int]] = []
    for size in sizes:
        if words and words[-1][0] == size:
            words[-1][1] += 1
        else:
            words.append([size, 1])
    return " ".join(f"{size}x{count}" if count > 1 else str(size) for size, count in words)
