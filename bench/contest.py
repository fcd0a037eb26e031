"""One row, one pass, all its opponents: answers checked against wider arithmetic, then times taken in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import answers
import opponents
import torch
from cases import Row, Run
from clock import Host, clock_of
from opponents import COMPILED, EPILOGUES, OURS, Contender
from pace import Pace
from patience import TooLong, abandon_compilation, time_limit
from timing import Quartiles, in_turns

CAPTURED_NUMBERS = 1 << 22  # of a layer's output, up to which launches may cost more than work, and calls are captured
SAME_STEP = 1e-5  # of the rate: how far one optimiser's step may be from another's, from the same gradients

Times = dict[str, dict[str, Quartiles]]  # by view, then by way


class Contest:
    """kind F: forward without gradients. FB: forward, backward to every parameter. S: a step of AdamW on top.

    Of a network: the mean squared error in between, eager for everyone; within one, the gradient of y is given and that
    of x wanted. Old gradients are let go in the measured call.
    """

    def __init__(self, row: Row, kind: str, device: str = "cpu") -> None:
        self.row, self.kind, self.device = row, kind, device
        self.module, self.x, self.target = opponents.draw(row, device)
        self.contenders: dict[str, Contender] = {"eager": opponents.of_module(self.module)}
        self.contenders["fused"] = opponents.fused(self.module, row)
        if row.family == "layer" and kind != "F":
            self.contenders["recomputed"] = opponents.fused(self.module, row, recompute=True)
        if row.can_stack:
            self.contenders["stacked"] = opponents.stacked(self.module, row)
        self.first_call_s: dict[str, float] = {}
        self.own = self._answer("eager", self.contenders["eager"])

    @cached_property
    def exact(self) -> dict[str, torch.Tensor]:
        return opponents.truth(self.module, self.row, self.kind, self.x, self.target)

    def _answer(self, way: str, contender: Contender) -> dict[str, torch.Tensor]:
        begin = time.perf_counter()
        answer = contender.answer(self.kind, self.x, self.target)
        self.first_call_s.setdefault(way, round(time.perf_counter() - begin, 2))
        return answer

    def errors(self, way: str, contender: Contender) -> dict[str, dict[str, float]]:
        return answers.errors(self._answer(way, contender), self.own, self.exact, self.row.depth)

    def check_ours(self) -> dict[str, dict[str, float]]:
        """{way: its worst errors}, or an AssertionError that says which tensor is wrong, and by how much."""
        found = {way: self.errors(way, c) for way, c in self.contenders.items() if way != "eager"}
        for way, errors in found.items():
            wrong = answers.wrong(errors)
            assert not wrong, f"{self.row} {self.kind}, {way}: " + "\n".join(wrong[:10])
        if self.kind == "S":
            self.check_steps()
        return {way: answers.worst(errors) for way, errors in found.items()}

    def check_steps(self) -> None:
        """From eager's gradients, our optimisers leave eager's parameters."""
        expected = self.contenders["eager"].stepped(self.own)
        others = {way: contender for way, contender in self.contenders.items() if way != "eager"}
        for way, contender in others.items():
            for name, tensor in contender.stepped(self.own).items():
                step = torch.finfo(tensor.dtype).eps * expected[name].abs() + opponents.CHECKED_RATE * SAME_STEP
                is_same = ((tensor - expected[name]).abs() <= step).all()
                assert is_same, f"{self.row} S, {way}: {name} is another than eager's after the same step"

    def mode(self) -> AbstractContextManager[object]:
        """What the calls of this kind have to be made in."""
        return torch.no_grad() if self.kind == "F" else nullcontext()

    def call(self, way: str) -> Callable[[], object]:
        return self.contenders[way].call(self.kind, self.x, self.target)

    def awaited_call(self, way: str) -> Callable[[], object]:
        """The same, until the device is done."""
        call, wait = self.call(way), clock_of(self.device).wait
        return lambda: (call(), wait())

    def measured(self, pace: Pace, clock: Host | None = None, peaks: dict[str, float] | None = None) -> dict[str, Any]:
        """A row of results: everybody's milliseconds, and the ratios of ours to them, to the floors and to the bar."""
        clock = clock or clock_of(self.device)
        errors = self.check_ours()
        failures: dict[str, str] = {}  # who is not timed, and why
        remarks: dict[str, str] = {}  # who is timed though its answer is wrong
        self._let_others_in(pace, errors, failures, remarks)
        del self.exact, self.own

        with self.mode():
            times, peak_bytes = self._times(clock, pace.budget_s, failures)
        medians = {way: t.median for way, t in times[clock.headline].items()}
        return {
            **_facts(self.row, self.kind, self.device),
            "milliseconds": _as_json(times.pop("host")),
            **({"device_milliseconds": {view: _as_json(of) for view, of in times.items()}} if times else {}),
            "headline": clock.headline,
            **_ratios(self.row, self.kind, self.device, medians),
            "rates": rates(self.row, self.kind, medians, peaks),
            **({"peak_bytes": peak_bytes} if peak_bytes else {}),
            "chosen": opponents.chosen(self.contenders["fused"].network, self.x).line,
            "errors_over_eager": errors,
            "first_call_s": self.first_call_s,
            "failures": failures,
            "remarks": remarks,
        }

    def _let_others_in(
        self, pace: Pace, errors: dict[str, dict[str, float]], failures: dict[str, str], remarks: dict[str, str]
    ) -> None:
        """Those who are compiled, and cuBLASLt where its epilogue is the row's φ; or says why not."""
        torch._dynamo.reset()  # so that no row inherits another's graph; Inductor's cache on disk stays in use
        for way in COMPILED[self.device]:
            if why := pace.why_not_compiled(way, self.row.depth):
                failures[way] = why
                continue
            try:
                with time_limit(pace.first_call_s[way]):
                    self._let_in(way, opponents.compiled(self.module, way), errors, failures, remarks)
            except TooLong:
                failures[way] = f"not compiled in {pace.first_call_s[way]:g} s"
                abandon_compilation()
            pace.compiled(way, self.row.depth, self.first_call_s.get(way, pace.first_call_s[way]))
        if self.device == "cuda" and self.kind == "F" and self.row.activation in EPILOGUES and self.row.rule != "post":
            self._let_in("cublaslt", opponents.cublaslt(self.module), errors, failures, remarks)

    def _let_in(
        self,
        way: str,
        contender: Contender,
        errors: dict[str, dict[str, float]],
        failures: dict[str, str],
        remarks: dict[str, str],
    ) -> None:
        """One who is timed if it runs at all; a wrong answer is remarked upon."""
        try:
            found = self.errors(way, contender)
        except Exception as error:
            failures[way] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return
        errors[way] = answers.worst(found)
        self.contenders[way] = contender
        if wrong := answers.wrong(found):
            remarks[way] = f"wrong, and timed all the same: {wrong[0]}"

    def _times(self, clock: Host, budget_s: float, failures: dict[str, str]) -> tuple[Times, dict[str, int]]:
        """Everybody's times by view, of captured calls too where the row is small; and what each adds to memory."""
        calls = {way: self.call(way) for way in self.contenders}
        views = clock.views()
        captured = {}
        if clock.captured_view and self.row.M * max(self.row.sizes) <= CAPTURED_NUMBERS:
            for way, call in calls.items():
                try:
                    captured[way] = clock.captured(call)
                except Exception as error:
                    failures[f"{way} in a graph"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        share_s = budget_s / (len(views) + bool(captured))
        times = {name: in_turns(calls, share_s, view.fill_s, run=view.run) for name, view in views.items()}
        if captured:
            view = views[clock.captured_view]
            times["graph"] = in_turns(captured, share_s, view.fill_s, run=view.run)
        peaks = {way: clock.peak_bytes(call) for way, call in calls.items()}
        return times, {way: peak for way, peak in peaks.items() if peak is not None}


def contest_of(run: Run) -> Contest:
    return Contest(run.row, run.kind, run.device)


# ---------------------------------------------------------------------------------------------- the machine's own


def measured_peaks(dtype: torch.dtype, clock: Host, budget_s: float = 3.0) -> dict[str, float]:
    """This machine's own ceilings, in its better rounds: a large copy, bytes read plus written, and a large product."""
    n = clock.multiplied
    with torch.device(clock.device):
        source = torch.randint(-100, 100, (clock.copied_bytes,), dtype=torch.int8)
        target = torch.empty_like(source)
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    view = clock.views()[clock.headline]
    times = in_turns(calls, budget_s, view.fill_s, run=view.run)
    return {
        "bytes_per_s": 2e3 * clock.copied_bytes / times["copy"].lower,
        "flops_per_s": 2e3 * n**3 / times["product"].lower,
    }


def rates(row: Row, kind: str, medians: dict[str, float], peaks: dict[str, float] | None) -> dict[str, Any]:
    """Useful work per time of everybody, `Row.work`'s; and the share of the roofline: the least time for it, by what
    this machine reaches in a copy and in a product, max(bytes / copy, flops / product), over the time taken."""
    work = row.work(kind)
    found: dict[str, Any] = {
        way: {"tflop_per_s": work.flops / ms / 1e9, "gb_per_s": work.bytes / ms / 1e6} for way, ms in medians.items()
    }
    if peaks:
        roof_ms = 1e3 * max(work.bytes / peaks["bytes_per_s"], work.flops / peaks["flops_per_s"])
        for way, ms in medians.items():
            found[way]["share_of_roofline"] = roof_ms / ms
    return found


# ---------------------------------------------------------------------------------------------- what a row says


def _as_json(times: dict[str, Quartiles]) -> dict[str, dict[str, float]]:
    return {way: {**t._asdict(), "spread": t.spread} for way, t in times.items()}


def _facts(row: Row, kind: str, device: str) -> dict[str, Any]:
    return {
        "row": row.name,
        "pass": kind,
        "device": device,
        "family": row.family,
        "source": row.source,
        "sizes": sizes_in_words(row.sizes),
        "width": max(row.sizes),
        "depth": row.depth,
        "M": row.M,
        "dtype": str(row.dtype).removeprefix("torch."),
        "activation": row.activation,
        "rule": row.rule,
        "learned": row.learns,
        "work": row.work(kind)._asdict(),
    }


def _ratios(row: Row, kind: str, device: str, medians: dict[str, float]) -> dict[str, Any]:
    """How many times as fast ours is as the others, and how many times the floor it takes: the CPU's, as the bar is."""
    compiled = [way for way in COMPILED["cpu"] if way in medians]
    best = min(compiled, key=medians.__getitem__, default=None)
    floor, bar = (row.floor_ms(kind), row.bar.get(kind)) if device == "cpu" else (None, None)
    found: dict[str, Any] = {"best_compile": best, "bar": bar, "floor_ms": floor}
    if floor is not None:
        found["floor_from"] = "stated" if kind in row.stated_floor_ms else "formula"
    for way in OURS:
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
