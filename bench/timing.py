"""How everything here is timed: opponents in turn, one process, medians with their spread; and on what machine."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

FLUSH_BYTES = 256 * 2**20  # several times any L2


class Timing(NamedTuple):
    """Milliseconds of one call: the median, the tenth and ninetieth percentile, and how many runs they are of."""

    median: float
    p10: float
    p90: float
    runs: int

    def __str__(self) -> str:
        return f"{self.median:.4g} ms ({self.p10:.4g} to {self.p90:.4g})"


def interleaved(
    functions: dict[str, Callable[[], object]],
    device: str = "cuda",
    runs: int = 50,
    calls: int = 1,
    warm: bool = False,
    budget_s: float = 20.0,
) -> dict[str, Timing]:
    """The time of each function's call, all taking turns, beginning with another one each round.

    On a GPU by device events, with L2 flushed before each run unless warm. A run is the mean of `calls` calls in a row.
    """
    names = list(functions)
    for function in functions.values():
        for _ in range(3):
            function()
    run = _device_run(warm) if device == "cuda" else _host_run
    samples: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    start = time.perf_counter()
    for i in range(runs):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(run(functions[name], calls))
        if time.perf_counter() - start > budget_s and i >= 4:
            break
    return {name: _timing([read() for read in reads]) for name, reads in samples.items()}


def _device_run(warm: bool) -> Callable[[Callable[[], object], int], Callable[[], float]]:
    filler = None if warm else torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def run(function: Callable[[], object], calls: int) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if filler is not None:
            filler.zero_()
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return lambda: begin.elapsed_time(end) / calls

    return run


def _host_run(function: Callable[[], object], calls: int) -> Callable[[], float]:
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    elapsed = time.perf_counter() - begin
    return lambda: elapsed * 1e3 / calls


def _timing(samples: list[float]) -> Timing:
    p10, median, p90 = (
        torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    )
    return Timing(median, p10, p90, len(samples))


def machine(device: str = "cuda") -> dict[str, str]:
    """What a figure has to be read with: the chip, the driver, the versions, the commit, the date."""
    facts = {"device": platform.processor() or platform.machine(), "driver": "none"}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts = {"device": torch.cuda.get_device_name(), "driver": _output(query) or "unknown"}
    return facts | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": ptxas(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def ptxas() -> str:
    """The version of the assembler that Triton runs: its wheel's, unless TRITON_PTXAS_PATH names another."""
    path = os.environ.get("TRITON_PTXAS_PATH") or str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    said = re.search(r"V(\d[\d.]*)", _output([path, "--version"]))
    return said[1] if said else "unknown"


def commit() -> str:
    """The commit of this tree: git's, else the variable COMMIT, for a copy without its history."""
    root = Path(__file__).resolve().parent.parent
    return _output(["git", "-C", str(root), "rev-parse", "HEAD"]) or os.environ.get("COMMIT") or "unknown"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    for fact, value in machine("cuda" if torch.cuda.is_available() else "cpu").items():
        print(f"{fact:<8}{value}")
