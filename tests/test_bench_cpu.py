"""The CPU benchmarks work, on small shapes: they check answers, find wrong ones, keep rows, and say who is slower."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from itertools import groupby
from pathlib import Path

import answers
import cases
import first_call
import opponents
import patience
import pytest
import torch
from cases import BASE, PASSES, ROWS, Row
from contest import Contest
from pictures import sweep_picture
from report import contest_table
from sweep import is_slower, sweep
from timing import Quartiles, Results, in_turns

from fusedres import native

ROOT = Path(__file__).parent.parent
SMALL = Row("small", (8, 8, 8, 5, 5, 1), 6, learns=True)


def run(*command: object, expected: tuple[int, ...] = (0,)) -> str:
    """What a command prints, run as by a user: natively and alone, whatever these tests set for the interpreter."""
    ours = ("TRITON_INTERPRET", "PYTEST_XDIST")  # pytest-benchmark writes nothing where it sees workers
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    environment |= {"PYTHONPATH": path, "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"}  # tests run beside others
    ran = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode in expected, ran.stdout[-4000:] + ran.stderr[-4000:]
    return ran.stdout


def benchmarks(*arguments: object) -> str:
    return run("-m", "pytest", "bench/", "-p", "no:cacheprovider", *arguments)


def test_without_the_flag_answers_are_checked():
    said = benchmarks("-k", "cpu and (a1-F or c1024-learned) or cuda and a1-F")
    if torch.cuda.is_available():
        assert "7 passed" in said
    else:
        assert "5 passed, 2 skipped" in said
        assert "no CUDA device" in said
    assert "bars met" not in said


def test_with_the_flag_rows_are_timed_and_kept(tmp_path):
    file = tmp_path / "cpu.json"
    arguments = ("--benchmark", "-k", "cpu and a1-F", "--benchmark-budget", 0, "--benchmark-compile-limit", 0)
    own = tmp_path / "own.json"  # pytest-benchmark's, where it is installed
    has_plugin = importlib.util.find_spec("pytest_benchmark") is not None
    said = benchmarks(*arguments, "--benchmark-results", file, *(("--benchmark-json", own) if has_plugin else ()))
    assert "2 passed" in said
    assert "compile: not compiled in 0 s" in said
    record = json.loads(file.read_text())
    assert set(record["rows"]) == {"a1-F", "a1-FB"}
    assert record["rows"]["a1-FB"]["milliseconds"].keys() == {"eager", "fused", "stacked"}
    assert record["rows"]["a1-FB"]["is_met"] is None
    if has_plugin:
        assert json.loads(own.read_text())["benchmarks"][0]["extra_info"]["row"] == "a1"

    assert "2 skipped" in benchmarks(*arguments, "--benchmark-results", file)
    assert "2 passed" in benchmarks(*arguments, "--benchmark-results", file, "--benchmark-again")


def test_what_the_total_leaves_no_time_for_is_measured_by_the_next_run(tmp_path):
    file = tmp_path / "cpu.json"
    few = ("--benchmark", "-k", "cpu and a1-F", "--benchmark-budget", 0, "--benchmark-compile-limit", 0)
    said = benchmarks(*few, "--benchmark-results", file, "--benchmark-total", 0)
    assert "2 skipped" in said
    assert "the total of 0 s is used up" in said
    assert json.loads(file.read_text())["left_out"] == ["a1-F", "a1-FB"]

    said = benchmarks(*few, "--benchmark-results", file)
    assert "[1 of 2, about" in said
    record = json.loads(file.read_text())
    assert (record["left_out"], list(record["rows"])) == ([], ["a1-F", "a1-FB"])
    assert record["peaks"]["cpu"]["float32"].keys() == {"bytes_per_s", "flops_per_s"}
    assert all(rates["share_of_roofline"] > 0 for rates in record["rows"]["a1-F"]["rates"].values())


def test_rows_of_other_sources_are_not_kept(tmp_path):
    file = tmp_path / "cpu.json"
    Results(file, "contest").add("a1-F", {"row": "a1"})
    assert Results(file, "contest").is_done("a1-F")
    assert not Results(file, "contest", again=True).is_done("a1-F")
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "sources": "others"}))
    assert not Results(file, "contest").is_done("a1-F")
    with pytest.raises(ValueError, match="must hold results of kind sweep, got contest"):
        Results(file, "sweep")


def test_the_sweep_runs(tmp_path):
    file, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    few = ("--rows", 1, 7, "--widths", 3, "--depths", 1, 4, "--out", file)
    command = (ROOT / "bench/sweep.py", *few, "--picture", picture)
    said = run(*command, "--budget", 60, expected=(0, 1))  # whether ours is slower is no question on a busy machine
    rows = json.loads(file.read_text())["rows"]
    slower = sum(row["is_slower"] for row in rows.values())
    assert f"{slower} of 8 slower than eager beyond noise" in said
    assert [rows["7x3x4-FB"][size] for size in ("M", "width", "depth", "pass")] == [7, 3, 4, "FB"]
    assert picture.stat().st_size > 10_000

    said = run(*command, "--budget", 0, expected=(int(slower > 0),))
    assert "8 of 8 are in" in said
    assert "8 left out: the budget of 0 s is used up" in run(*command, "--again", "--budget", 0, expected=(0, 1))


def test_the_profile_and_the_memory_run(tmp_path):
    assert "products alone" in run(ROOT / "bench/cpu_profile.py", "c1024", "--rows", 32, "--budget", 0)
    contest = {"rows": {str(i): {"row": "a1", "pass": "F", "is_met": met} for i, met in enumerate((True, False, None))}}
    (tmp_path / "contest.json").write_text(json.dumps(contest))
    file = tmp_path / "profile.json"
    run(ROOT / "bench/cpu_profile.py", "--missed", tmp_path / "contest.json", "--budget", 0, "--json", file)
    assert list(json.loads(file.read_text())["rows"]) == ["a1-F"]
    file = tmp_path / "memory.json"
    run(ROOT / "bench/memory.py", "--rows", 8192, "--json", file)
    assert json.loads(file.read_text())["rows"]["c65536"]["over_eager"]["recompute"] < 0.5


def test_the_seconds_of_a_first_call():
    parts = first_call.seconds(str(native.cache_folder()))
    assert list(parts) == ["import torch", "import fusedres", "first call"]
    assert parts["first call"] < 5, "found, not built"


@pytest.mark.parametrize(("roundings", "is_wrong"), [(1, False), (4, True)])
def test_a_single_number_may_be_a_rounding_off(roundings, is_wrong):
    """Eager may have it exactly, and there is no mean."""
    own = {"y": torch.ones(20), "weight 0": torch.ones(1, 1)}
    answer = own | {"weight 0": torch.ones(1, 1) + roundings * torch.finfo(torch.float32).eps}
    exact = {name: tensor.double() for name, tensor in own.items()}
    assert bool(answers.wrong(answers.errors(answer, own, exact, depth=1))) == is_wrong


@pytest.mark.parametrize("kind", PASSES)
def test_a_wrong_answer_is_found(kind):
    contest = Contest(SMALL, kind)
    contest.check_ours()
    right = contest.contenders["fused"]

    def with_another_gelu(x: torch.Tensor) -> torch.Tensor:
        module = contest.module
        for layer, skips, place in zip(module.layers, module.skips, module.scale_of, strict=True):
            y = torch.nn.functional.gelu(layer(x), approximate="tanh")
            x = module.scales[place] * x + y if skips else y
        return x

    contest.contenders["fused"] = opponents.of_module(contest.module, with_another_gelu)
    with pytest.raises(AssertionError, match=r"small .*, fused: y: largest error"):
        contest.check_ours()

    def without_a_gradient(answer):
        return lambda *arguments: {n: t * (n != "scale 1") for n, t in answer(*arguments).items()}

    if kind == "FB":
        right.answer = without_a_gradient(right.answer)
        contest.contenders["fused"] = right
        with pytest.raises(AssertionError, match="every small scale"):
            contest.check_ours()


def test_floors_are_those_stated():
    """Where the study states a floor it is the formula's, but for two it counted otherwise: c65536 FB and b512, d."""
    close = {("c1024", "F"), ("c65536", "F")}
    for row in BASE:
        for kind, stated in row.stated_floor_ms.items():
            computed = row.computed_floor_ms(kind)
            assert computed == pytest.approx(stated, rel=0.01 if (row.name, kind) in close else 0.25)
            assert row.floor_ms(kind) == stated
    assert cases.named("d-bf16").floor_ms("F") is None


def test_rows_are_the_networks_meant():
    a, c = cases.named("a1-learned"), cases.named("c1024")
    assert (a.depth, a.skips, a.learns) == (13, [True] * 12 + [False], True)
    assert [list(run) for run in c.runs()] == [list(range(16)), [16]]
    assert not cases.named("b1").can_stack
    assert not any(row.name.startswith("b") for row in ROWS if row.learns)
    assert len(list(sweep())) == 5 * 10 * 3
    with pytest.raises(ValueError, match=r"a row must be one of a1, .*, got a2"):
        cases.named("a2")


def test_turns_fill_their_time_and_quartiles_tell_slower_from_noise():
    calls = {"long": 0, "short": 0}

    def call(name: str) -> None:
        calls[name] += 1
        sum(range(20_000 if name == "long" else 200))

    times = in_turns({name: lambda name=name: call(name) for name in calls}, budget_s=0, least=4)
    assert times["short"].rounds == times["long"].rounds == 4
    assert times["short"].calls > times["long"].calls
    assert times["long"].lower <= times["long"].median <= times["long"].upper

    made: list[str] = []
    times = in_turns({name: partial(made.append, name) for name in "ab"}, budget_s=0, least=2, fill_s=1e-5)
    *_, (last, turn) = ((name, len(list(calls))) for name, calls in groupby(made))
    assert (last, turn) == ("a", times["a"].calls + 1), "a short call is to find what a loop of its own leaves"

    eager = Quartiles(1.0, 0.9, 1.1, 9, 1)
    assert is_slower({"eager": eager, "fused": Quartiles(1.3, 1.2, 1.4, 9, 1)})
    assert not is_slower({"eager": eager, "fused": Quartiles(1.3, 1.1, 1.4, 9, 1)})


def test_tables_say_met_and_missed(tmp_path):
    def row(name: str, ratio: float | None, met: bool | None) -> dict:
        times = {way: {"median": 1.0, "spread": 0.1} for way in ("eager", "fused")}
        fused = {"over_eager": 2.0, "over_best_compile": ratio, "over_floor": 3.0}
        ours = {"milliseconds": times, "fused": fused, "floor_ms": 0.3, "bar": 2.0, "is_met": met}
        failures = {"compile": "no compiler"} if met is None else {}
        remarks = {} if met else {"eager": "wrong"}
        return {"row": name, "pass": "F", "failures": failures, "remarks": remarks, **ours}

    rows = {str(i): row(f"n{i}", *of) for i, of in enumerate([(2.5, True), (1.5, False), (None, None)])}
    said = contest_table({"kind": "contest", "rows": rows})
    assert "1 of 2 bars met" in said
    assert "n2 F, compile: no compiler" in said
    assert "n1 F, eager: wrong" in said
    assert said.count("1 ±5%!") == 2
    assert [line.split()[0] for line in said.splitlines() if "missed" in line] == ["n1"]


def test_a_picture_of_few_shapes_is_drawn(tmp_path):
    shape = {"M": 1, "width": 3, "depth": 4, "pass": "FB", "over_eager": 0.5, "is_slower": True, "is_eager": False}
    sweep_picture({"cpu": "a processor", "threads": 2, "rows": {"1x3x4-FB": shape}}, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 5_000


def test_compilers_that_nobody_waits_for_are_ended(tmp_path):
    compiler = tmp_path / "g++"
    compiler.symlink_to(shutil.which("sleep"))
    running = subprocess.Popen([compiler, "60"])
    other = subprocess.Popen(["sleep", "60"])
    try:
        patience.abandon_compilation()
        assert running.wait(5) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (running, other):
            process.kill()
            process.wait()


def test_a_compilation_that_takes_too_long_is_given_up():
    def work() -> None:
        for _ in range(10**9):
            with contextlib.suppress(Exception):  # as compilers do
                sum(range(1000))

    with pytest.raises(patience.TooLong), patience.time_limit(0.05):
        work()
