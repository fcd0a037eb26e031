"""pytest bench/ --benchmark: the rows of cases.py against eager PyTorch and torch.compile, timed in one process.

    pytest bench/ --benchmark -k "cpu and layer" --benchmark-results FILE.json      again, to go on where it stopped
    python bench/report.py FILE.json --pictures FOLDER

-k selects by words: cpu, cuda; layer, stack, mlp; a row's name. Without --benchmark the same files run as quick checks
of the answers, on few rows and narrow. Options of pytest-benchmark go on working: it times the fused network alone,
after the contest, and keeps the contest's figures as extra_info.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pace import Pace
from report import contest_line, contest_table
from timing import Results

_results = pytest.StashKey[Results]()
_pace = pytest.StashKey[Pace]()
_todo = pytest.StashKey[list[str]]()  # the keys of rows to measure, in their order


NO_RUN = SimpleNamespace(params={})


class _WithoutPlugin:
    """In the place of pytest-benchmark, where it is not installed or switched off: nothing beside the contest."""

    @pytest.fixture
    def benchmark(self) -> None:
        return None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("contest", "networks, layers and stacks, timed")
    group.addoption("--benchmark", dest="contest", action="store_true", help="time, not only check")
    group.addoption(
        "--benchmark-results", dest="contest_results", type=Path, metavar="FILE", help="keep rows in a JSON file"
    )
    group.addoption(
        "--benchmark-again", dest="contest_again", action="store_true", help="measure rows that the file has too"
    )
    group.addoption(
        "--benchmark-budget", dest="contest_budget", type=float, default=20.0, metavar="SECONDS", help="of rounds a row"
    )
    group.addoption(
        "--benchmark-total",
        dest="contest_total",
        type=float,
        metavar="SECONDS",
        help="of the whole run: no row begins later, and compilations that would take long are left out before",
    )
    group.addoption(
        "--benchmark-compile-limit",
        dest="contest_compile_limit",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="for torch.compile's first call; 0: leave torch.compile out",
    )
    group.addoption(
        "--benchmark-autotune-limit",
        dest="contest_autotune_limit",
        type=float,
        metavar="SECONDS",
        help="for the first call with mode max-autotune; default: the compile limit",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if not config.pluginmanager.has_plugin("benchmark"):
        config.pluginmanager.register(_WithoutPlugin(), "contest-alone")
    if option.contest and getattr(option, "numprocesses", None):
        raise pytest.UsageError("--benchmark expected one process, got -n: workers beside it would be in the figures")
    asked = any(getattr(option, name, None) for name in ("benchmark_enable", "benchmark_only", "benchmark_json"))
    if not option.contest and not asked:
        option.benchmark_disable = True
    if option.contest:
        try:
            config.stash[_results] = Results(option.contest_results, "contest", option.contest_again)
        except ValueError as wrong:
            raise pytest.UsageError(str(wrong)) from wrong


def pytest_collection_finish(session: pytest.Session) -> None:
    results = session.config.stash.get(_results, None)
    if results is None:
        return
    runs = [item.callspec.params["run"] for item in session.items if "run" in getattr(item, "callspec", NO_RUN).params]
    session.config.stash[_todo] = [
        run.key for run in runs if not results.is_done(run.key) and (run.device == "cpu" or torch.cuda.is_available())
    ]
    session.config.stash[_pace] = _new_pace(session.config)  # the time runs from here


def _new_pace(config: pytest.Config) -> Pace:
    option = config.option
    compile_s, autotune_s = option.contest_compile_limit, option.contest_autotune_limit
    if autotune_s is None:
        autotune_s = compile_s
    limits_s = {"compile": compile_s, "compile-autotuned": autotune_s}
    return Pace(option.contest_budget, limits_s, option.contest_total)


@pytest.fixture
def pace(request: pytest.FixtureRequest) -> Pace:
    return request.config.stash.get(_pace, None) or _new_pace(request.config)


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results | None:
    """None without --benchmark: answers are checked, and nothing is timed."""
    return request.config.stash.get(_results, None)


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], None]:
    """Prints a row at once, past pytest's capturing, with its place among those to measure."""
    config = request.config
    capture = config.pluginmanager.getplugin("capturemanager")
    reporter = config.pluginmanager.getplugin("terminalreporter")

    def print_line(key: str, row: dict[str, Any]) -> None:
        todo = config.stash[_todo]
        place = f"[{config.stash[_pace].outlook(todo.index(key) + 1, len(todo))}] " if key in todo else "[kept] "
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(place + contest_line(row))

    return print_line


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(_results, None)
    if results is not None and results.rows:
        terminalreporter.section("times")
        terminalreporter.write_line(contest_table(results.record))
