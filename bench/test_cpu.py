"""The networks of cpu_cases.py: is the answer right, and with --benchmark, how long do we and others take?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from contest import Contest, Limits
from cpu_cases import PASSES, ROWS, Row
from timing import Results

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # Inductor's own affair
FEW_ROWS = 96  # of x, where only the answer is asked for


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_network(
    row: Row, kind: str, limits: Limits, results: Results | None, say: Callable[[dict], None], benchmark: Any
) -> None:
    if results is None:
        contest = Contest(row.shrunk(FEW_ROWS), kind)
        contest.check_ours()
        calls = 1
    elif results.is_done(name := f"{row}-{kind}"):
        say(results.rows[name])
        pytest.skip(f"{results.path} has this row")
    else:
        contest = Contest(row, kind)
        found = contest.measured(limits)
        results.add(name, found)
        say(found)
        calls = found["milliseconds"]["fused"]["calls"]
        if benchmark is not None:
            benchmark.extra_info.update(found)
    if benchmark is not None:  # ours alone, for pytest-benchmark's own tables and files
        with contest.mode():
            benchmark.pedantic(contest.call("fused"), rounds=5, iterations=calls)
