"""How everything here is timed: opponents in turn, one process, medians with their spread; and on what machine."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from fusedres.studies.machine import commit, cpu_name, now, said

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


class Quartiles(NamedTuple):
    """Milliseconds of one call: the median and the quartiles over rounds, a round being the mean of `calls` calls."""

    median: float
    lower: float
    upper: float
    rounds: int
    calls: int

    @property
    def spread(self) -> float:
        """(upper - lower) / median."""
        return (self.upper - self.lower) / self.median


Run = Callable[[Callable[[], object], int], float]  # milliseconds of one of so many calls in a row


def in_turns(
    functions: dict[str, Callable[[], object]],
    budget_s: float = 20.0,
    fill_s: float = 2e-3,
    least: int = 3,
    most: int = 1000,
    long_s: float = 0.05,
    run: Run | None = None,
) -> dict[str, Quartiles]:
    """Time of each function's call, the CPU's unless `run` tells another, in rounds that begin with another one each.

    In a round each function is called as often in a row as fills `fill_s`, so that the clock's own cost vanishes. A
    call that takes less than `long_s` is made once more before the clock starts: it finds caches and memory as a loop
    of its own leaves them, not as the function before did. Rounds go on until they have taken `budget_s`; there are at
    least `least`.
    """
    run = run or _cpu_run
    calls = {name: _calls_to_fill(function, fill_s, run) for name, function in functions.items()}
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what lives longer than the rounds is not searched again within them
    try:
        start = time.perf_counter()
        for i in range(most):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                if (samples[name] or [0.0])[-1] < long_s * 1e3:
                    functions[name]()
                samples[name].append(run(functions[name], calls[name]))
            if i + 1 >= least and time.perf_counter() - start > budget_s:
                break
    finally:
        gc.unfreeze()
    return {name: _quartiles(found, calls[name]) for name, found in samples.items()}


def _cpu_run(function: Callable[[], object], calls: int) -> float:
    return _host_run(function, calls)()


def _calls_to_fill(function: Callable[[], object], fill_s: float, run: Run) -> int:
    """How many calls take fill_s, asked of the function itself, which warms up by it."""
    function()
    calls = 1
    while (taken_s := run(function, calls) * calls / 1e3) < fill_s:
        calls = max(2 * calls, min(10 * calls, math.ceil(calls * fill_s / max(taken_s, 1e-9))))
    return max(1, math.ceil(calls * fill_s / max(taken_s, 1e-9)))


def _quartiles(samples: list[float], calls: int) -> Quartiles:
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    lower, median, upper = torch.tensor(samples, dtype=torch.float64).quantile(at).tolist()
    return Quartiles(median, lower, upper, len(samples), calls)


def machine(device: str = "cuda") -> dict[str, str]:
    """What a figure has to be read with: the chip, the driver, the versions, the commit, the date."""
    facts = {"device": platform.processor() or platform.machine(), "driver": "none"}
    if device == "cuda":
        facts = {"device": torch.cuda.get_device_name(), "driver": _driver()}
    return facts | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": ptxas(),
        "commit": commit(),
        "date": now(),
    }


def _driver() -> str:
    return said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "unknown"


def host() -> dict[str, str | float]:
    """What a figure has to be read with: the processor, its threads, compiler, versions, commit and date; the GPU."""
    has_gpu = torch.cuda.is_available()
    gpu = {"gpu": torch.cuda.get_device_name(), "driver": _driver(), "ptxas": ptxas()} if has_gpu else {}
    return {
        **gpu,
        "triton": triton.__version__,
        "cpu": cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": _compiler(),
        "commit": commit(),
        "sources": sources(),
        "load_before": round(os.getloadavg()[0], 2),
        "date": now(),
    }


def _compiler() -> str:
    """The first line that the compiler of the CPU kernels says of itself."""
    from fusedres import toolchain

    try:
        return said([*toolchain.find_compiler().command, "--version"]).partition("\n")[0] or "unknown"
    except toolchain.Unavailable as why:
        return f"none: {why}"


def sources() -> str:
    """A checksum of everything that is measured: the package's files and its kernels."""
    root = Path(__file__).resolve().parent.parent
    found = hashlib.sha256()
    for folder in ("fusedres", "kernels"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h") and path.is_file():
                found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Results:
    """Rows of measurements in a JSON file, written after each one; a later run keeps those it finds there.

    Not those from other sources of fusedres, another processor, GPU, number of threads, torch or compiler. `again`
    measures rows anew as they come, and keeps those that do not come. What the machine itself was found to reach goes
    with the rows.
    """

    SAME = ("sources", "cpu", "gpu", "threads", "torch", "compiler")

    def __init__(self, path: Path | None, kind: str, again: bool = False) -> None:
        self.path, self.again = path, again
        self.record: dict[str, Any] = {"kind": kind, **host(), "peaks": {}, "left_out": [], "rows": {}}
        if path is None or not path.exists():
            return
        before = json.loads(path.read_text())
        if before.get("kind") != kind:
            raise ValueError(f"{path} must hold results of kind {kind}, got {before.get('kind')}")
        if all(before.get(fact) == self.record.get(fact) for fact in self.SAME):
            self.record |= {name: before[name] for name in ("rows", "peaks", "left_out") if name in before}

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return self.record["rows"]

    def is_done(self, name: str) -> bool:
        """Whether the file had this row, and nobody asked for it again."""
        return name in self.rows and not self.again

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row, with the commit and the hour it is of."""
        self.rows[name] = {**row, "commit": self.record["commit"], "date": now()}
        self.record["left_out"] = [other for other in self.record["left_out"] if other != name]
        self.write()

    def leave_out(self, name: str) -> None:
        """Say of a row that there was no time for it."""
        if name not in self.record["left_out"]:
            self.record["left_out"].append(name)
            self.write()

    def write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch = self.path.with_name(self.path.name + ".part")
            scratch.write_text(json.dumps(self.record, indent=1) + "\n")
            scratch.replace(self.path)  # a run that is killed leaves the rows that it had


def ptxas() -> str:
    """The version of the assembler that Triton runs: its wheel's, unless TRITON_PTXAS_PATH names another."""
    path = os.environ.get("TRITON_PTXAS_PATH") or str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    found = re.search(r"V(\d[\d.]*)", said([path, "--version"]))
    return found[1] if found else "unknown"


if __name__ == "__main__":
    for fact, value in (machine() if torch.cuda.is_available() else host()).items():
        print(f"{fact:<16}{value}")
