"""The rows of cases.py: is the answer right, and with --benchmark, how long do we and others take?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Run, runs
from clock import clock_of
from contest import Contest, contest_of, measured_peaks
from pace import Pace
from timing import Results

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # Inductor's own affair
FEW_ROWS, NARROW, SHALLOW = 96, 512, 64  # where only the answer is asked for


def quick(run: Run) -> Run:
    """The same on few rows, narrow and not deep."""
    return run._replace(row=run.row.narrowed(NARROW, SHALLOW).shrunk(FEW_ROWS))


@pytest.mark.parametrize("run", list(runs()), ids=str)
def test_answers_and_times(
    run: Run, pace: Pace, results: Results | None, say: Callable[[str, dict], None], benchmark: Any
) -> None:
    if run.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if results is None:
        contest = contest_of(quick(run))
        contest.check_steps() if run.kind == "S" else contest.check_ours()  # FB has the same gradients
        calls = 1
    elif results.is_done(run.key):
        say(run.key, results.rows[run.key])
        pytest.skip(f"{results.path} has this row")
    elif pace.left_s <= 0:
        results.leave_out(run.key)
        pytest.skip(f"the total of {pace.total_s:g} s is used up")
    else:
        contest, found = measured(run, pace, results)
        say(run.key, found)
        calls = found["milliseconds"]["fused"]["calls"]
        if benchmark is not None:
            benchmark.extra_info.update(found)
    if benchmark is not None:  # ours alone, for pytest-benchmark's own tables and files
        with contest.mode():
            benchmark.pedantic(contest.awaited_call("fused"), rounds=5, iterations=calls)


def measured(run: Run, pace: Pace, results: Results) -> tuple[Contest, dict[str, Any]]:
    """The contest and its row of results, with the machine's ceilings for its dtype, measured once a file."""
    clock = clock_of(run.device)
    dtype = str(run.row.dtype).removeprefix("torch.")
    ceilings = results.record["peaks"].setdefault(run.device, {})
    if dtype not in ceilings:
        ceilings[dtype] = measured_peaks(run.row.dtype, clock, min(3.0, pace.budget_s))
    begin = time.perf_counter()
    contest = contest_of(run)
    found = contest.measured(pace, clock, ceilings[dtype])
    pace.measured(time.perf_counter() - begin)
    results.add(run.key, found)
    return contest, found
