"""How rows are measured: every rule's formula, the optimiser's step, the clocks of a device, and the time left."""

from __future__ import annotations

import time
from dataclasses import replace

import opponents
import pytest
import torch
import torch.nn.functional as F
from cases import PASSES, Row
from clock import Call, Events, Host
from contest import Contest, measured_peaks
from pace import Pace

NETWORK = Row("small", (8, 8, 8, 5, 5, 1), 6, learns=True)
LAYER = Row("a-layer", (8, 8), 6, family="layer", activation="relu")
SMALL = (
    NETWORK,
    LAYER,
    Row("a-stack", (8,) * 4, 6, family="stack", activation="gelu-tanh"),
    Row("an-mlp", (6, 24, 6), 7, family="mlp", rule="mlp"),
    Row("post", (6,) * 5, 7, activation="relu", rule="post"),
    Row("projected", (8, 4, 4, 1), 7, rule="projection"),
    Row("linear", (5,) * 4, 7, activation="none"),
)
NOT_COMPILED = {"compile": 0.0, "compile-autotuned": 0.0}


class Device(Events):
    """A device that works on the CPU, and counts what is asked of it."""

    copied_bytes, multiplied = 1 << 12, 8

    def __init__(self) -> None:
        self.flushed = self.timed = 0
        self.calls_captured: list[Call] = []

    def flush(self) -> None:
        self.flushed += 1

    def elapsed_ms(self, call: Call, calls: int) -> float:
        self.timed += 1
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - begin)

    def peak_bytes(self, call: Call) -> int:
        call()
        return 1024

    def captured(self, call: Call) -> Call:
        self.calls_captured.append(call)
        return call


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("row", SMALL, ids=str)
def test_ours_agree_with_eager(row, kind):
    contest = Contest(row, kind)
    found = contest.check_ours()
    assert found.keys() == contest.contenders.keys() - {"eager"}
    assert ("stacked" in found) == row.can_stack
    assert ("recomputed" in found) == (row.family == "layer" and kind != "F")
    assert ("x" in contest.own) == (row.is_within and kind != "F")


def by_formula(row: Row, module: opponents.EagerNetwork, x: torch.Tensor) -> torch.Tensor:
    """The docstrings of cases.py once more."""
    W = [(layer.weight, layer.bias) for layer in module.layers]
    if row.rule == "mlp":
        return x + F.linear(F.gelu(F.linear(x, *W[0])), *W[1])
    if row.rule == "post":
        for first, second in ((W[0], W[1]), (W[2], W[3])):
            x = F.relu(x + F.linear(F.relu(F.linear(x, *first)), *second))
        return x
    if row.rule == "projection":
        for i, (K, N) in enumerate(row.layers):
            skip = x if K == N else module.projections[str(i)](x)
            x = skip + F.gelu(F.linear(x, *W[i]))
        return x
    phi = {"relu": F.relu, "none": lambda z: z, "gelu-tanh": lambda z: F.gelu(z, approximate="tanh")}[row.activation]
    for one in W:
        x = x + phi(F.linear(x, *one))
    return x


@pytest.mark.parametrize("row", SMALL[1:], ids=str)
def test_eager_computes_the_formula_of_its_rule(row):
    module, x, _ = opponents.draw(row)
    torch.testing.assert_close(module(x), by_formula(row, module, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("row", [replace(row, activation="relu") for row in (LAYER, SMALL[3])], ids=str)
def test_the_epilogue_of_cublaslt_is_the_same_layer(row):
    """Its gelu is the tanh form on CUDA alone."""
    module, x, _ = opponents.draw(row)
    with torch.no_grad():
        torch.testing.assert_close(opponents.cublaslt(module).network(x), module(x), rtol=0, atol=1e-6)


def test_others_are_timed_though_wrong_and_left_out_where_they_fail():
    contest = Contest(LAYER, "F")
    errors, failures, remarks = {}, {}, {}

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such\nkernel")

    for way, network in (("compile", lambda x: 2 * contest.module(x)), ("cublaslt", fails)):
        contest._let_in(way, opponents.of_module(contest.module, network), errors, failures, remarks)
    assert failures == {"cublaslt": "RuntimeError: no such kernel"}
    assert remarks["compile"].startswith("wrong, and timed all the same: y: largest error")
    assert errors.keys() == {"compile"}
    assert contest.contenders.keys() == {"eager", "fused", "compile"}


def test_a_step_that_is_not_eagers_is_found():
    contest = Contest(SMALL[2], "S")
    contest.check_ours()
    of_stack = contest.contenders["stacked"]
    of_stack.optimizer = lambda rate: torch.optim.AdamW(of_stack.parameters, lr=2 * rate)
    with pytest.raises(
        AssertionError, match="a-stack S, stacked: weight 0 is another than eager's after the same step"
    ):
        contest.check_ours()


def test_steps_leave_the_numbers_that_times_depend_on():
    contest = Contest(NETWORK, "S")
    before = {name: tensor.clone() for name, tensor in contest.module.state_dict().items()}
    contest.check_ours()
    call = contest.call("fused")
    for _ in range(20):
        call()
    for name, tensor in contest.module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


def measured(row: Row, kind: str, clock: Host) -> dict:
    peaks = {"bytes_per_s": 1e9, "flops_per_s": 1e9}
    return Contest(row, kind).measured(Pace(0.0, NOT_COMPILED), clock, peaks)


@pytest.mark.parametrize("kind", PASSES)
def test_a_device_is_timed_cold_warm_and_in_a_graph(kind):
    clock = Device()
    row = measured(LAYER, kind, clock)
    ways = {"eager", "fused"} | ({"recomputed"} if kind != "F" else set())
    assert row["milliseconds"].keys() == ways
    assert row["device_milliseconds"].keys() == {"cold", "warm", "graph"}
    assert all(of.keys() == ways for of in row["device_milliseconds"].values())
    assert 0 < clock.flushed < clock.timed
    assert len(clock.calls_captured) == len(ways)
    cold = row["device_milliseconds"]["cold"]
    assert row["headline"] == "cold"
    assert row["fused"]["over_eager"] == cold["eager"]["median"] / cold["fused"]["median"]
    assert all(t["calls"] == 1 for t in cold.values()), "the second call in a row would find a warm cache"
    assert row["peak_bytes"] == dict.fromkeys(ways, 1024)
    roof_ms = 1e3 * max(row["work"]["bytes"], row["work"]["flops"]) / 1e9
    assert row["rates"]["eager"]["share_of_roofline"] == pytest.approx(roof_ms / cold["eager"]["median"])


def test_a_cpu_is_timed_by_the_wall():
    row = measured(LAYER, "F", Host())
    assert row["headline"] == "host"
    assert not row.keys() & {"device_milliseconds", "peak_bytes"}
    ms = row["milliseconds"]["fused"]["median"]
    assert row["rates"]["fused"]["gb_per_s"] == pytest.approx(row["work"]["bytes"] / ms / 1e6)
    assert row["first_call_s"].keys() == {"eager", "fused"}


def test_a_call_that_cannot_be_captured_is_timed_without(monkeypatch):
    def captured(self: Device, call: Call) -> Call:
        raise RuntimeError("operation not\npermitted when stream is capturing")

    monkeypatch.setattr(Device, "captured", captured)
    row = measured(LAYER, "F", Device())
    assert row["failures"]["fused in a graph"] == "RuntimeError: operation not permitted when stream is capturing"
    assert row["device_milliseconds"].keys() == {"cold", "warm"}


def test_what_is_large_is_not_captured(monkeypatch):
    clock = Device()
    monkeypatch.setattr("contest.CAPTURED_NUMBERS", LAYER.M * 8 - 1)
    assert "graph" not in measured(LAYER, "F", clock)["device_milliseconds"]
    assert not clock.calls_captured


def test_the_ceilings_are_of_a_copy_and_a_product():
    class Steady(Device):
        def elapsed_ms(self, call: Call, calls: int) -> float:
            return super().elapsed_ms(call, calls) * 0 + calls * 2.0

    found = measured_peaks(torch.float32, Steady(), 0.0)
    assert found == {"bytes_per_s": 2 * 4096 / 2e-3, "flops_per_s": 2 * 8**3 / 2e-3}


# ---------------------------------------------------------------------------------------------- the time left


class Hours:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_autotuning_yields_first_then_compiling_then_rows():
    hours = Hours()
    pace = Pace(1.0, {"compile": 60.0, "compile-autotuned": 60.0}, total_s=100.0, clock=hours)
    ways = ("compile", "compile-autotuned")

    def left_out() -> list[str]:
        return [way for way in ways if pace.why_not_compiled(way, 1)]

    assert left_out() == []
    pace.compiled("compile-autotuned", 1, 20.0)  # the next would be beyond its share of the total
    assert left_out() == ["compile-autotuned"]
    assert "10 s left for it, about 30 needed" in pace.why_not_compiled("compile-autotuned", 1)
    hours.now = 97.0
    assert left_out() == ["compile", "compile-autotuned"]
    assert pace.left_s == 3
    assert Pace(1.0, NOT_COMPILED).why_not_compiled("compile", 1) == "not compiled in 0 s"
    assert Pace(1.0, {"compile": 9.0}).why_not_compiled("compile", 10**6) is None, "without a total all may be compiled"


def test_deep_networks_need_more_time_to_compile():
    pace = Pace(1.0, {"compile": 60.0, "compile-autotuned": 60.0}, total_s=100.0, clock=Hours())
    assert pace.why_not_compiled("compile", 8) is None
    assert pace.why_not_compiled("compile", 1000)


def test_the_outlook_is_that_of_the_rows_so_far():
    hours = Hours()
    pace = Pace(1.0, NOT_COMPILED, total_s=1000.0, clock=hours)
    assert pace.outlook(1, 9) == "1 of 9"
    pace.measured(10.0)
    pace.measured(20.0)
    assert pace.outlook(2, 9) == "2 of 9, about 2 min left"
    hours.now = 940.0
    assert pace.outlook(2, 9) == "2 of 9, about 60 s left", "no row begins after the total"
