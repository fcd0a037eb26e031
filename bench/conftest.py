"""pytest bench/ --benchmark -k cpu: CPU.md's networks against eager PyTorch and torch.compile, timed in one process.

Without --benchmark the same files run as quick checks of the answers, on few rows. Options of pytest-benchmark go on
working: it times the fused network alone, after the contest, and keeps the contest's figures as extra_info.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contest import Limits
from cpu_table import contest_line, contest_table
from timing import Results

_results = pytest.StashKey[Results]()


class _WithoutPlugin:
    """In the place of pytest-benchmark, where it is not installed or switched off: nothing beside the contest."""

    @pytest.fixture
    def benchmark(self) -> None:
        return None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("contest", "networks on the CPU, timed")
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


@pytest.fixture
def limits(request: pytest.FixtureRequest) -> Limits:
    option = request.config.option
    compile_s, autotune_s = option.contest_compile_limit, option.contest_autotune_limit
    if autotune_s is None:
        autotune_s = compile_s
    return Limits(option.contest_budget, {"compile": compile_s, "compile-autotuned": autotune_s})


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results | None:
    """None without --benchmark: answers are checked, and nothing is timed."""
    return request.config.stash.get(_results, None)


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """Prints a row at once, past pytest's capturing."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    reporter = request.config.pluginmanager.getplugin("terminalreporter")

    def print_line(row: dict[str, Any]) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(contest_line(row))

    return print_line


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(_results, None)
    if results is not None and results.rows:
        terminalreporter.section("networks on the CPU")
        terminalreporter.write_line(contest_table(results.record))
