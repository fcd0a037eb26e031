"""The clocks: what a device's time is, how its caches are emptied, its calls captured, its memory counted.

    host    wall time from Python's call to the last result, the device waited for at both ends
    cold    CUDA alone: device time of one call between two events, the second-level cache flushed before it
    warm    the same of calls in a row, which find the cache as they leave it
    graph   the same of the calls captured as a CUDA graph: what is left without the launches

Device time has gaps in it where the host launches more slowly than the device works; graph has none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from timing import FLUSH_BYTES, Run

Call = Callable[[], object]


class View(NamedTuple):
    """One way to look at a call's time; calls in a row fill `fill_s`, 0 being one call."""

    run: Run
    fill_s: float


class Host:
    """A CPU's: wall time alone, no graphs, no count of memory (bench/memory.py has that, in processes of their own)."""

    device = "cpu"
    headline = "host"  # the view that ratios and rates are of
    captured_view: str | None = None  # how captured calls are timed
    copied_bytes = 1 << 28
    multiplied = 2048  # rows and columns of the matrices that the rate of products is of

    def wait(self) -> None:
        """Until the device has done what it was given."""

    def peak_bytes(self, call: Call) -> int | None:
        """What the call adds at its highest to the memory in use; None where nobody counts."""
        return None

    def captured(self, call: Call) -> Call:
        raise NotImplementedError("a CPU's calls are not captured")

    def views(self) -> dict[str, View]:
        return {"host": View(self._host, 2e-3)}

    def _host(self, call: Call, calls: int) -> float:
        self.wait()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        self.wait()
        return (time.perf_counter() - begin) * 1e3 / calls


class Events(Host):
    """A device that keeps its own time, seen warm and cold; subclasses say how."""

    headline = "cold"
    captured_view = "warm"

    def flush(self) -> None:
        """Empties the device's caches."""
        raise NotImplementedError

    def elapsed_ms(self, call: Call, calls: int) -> float:
        """The device's time from the first call's begin to the last one's end."""
        raise NotImplementedError

    def views(self) -> dict[str, View]:
        return {**super().views(), "cold": View(self._cold, 0.0), "warm": View(self._warm, 1e-3)}

    def _cold(self, call: Call, calls: int) -> float:
        self.flush()
        return self.elapsed_ms(call, calls) / calls

    def _warm(self, call: Call, calls: int) -> float:
        return self.elapsed_ms(call, calls) / calls


class Cuda(Events):
    device = "cuda"
    copied_bytes = 1 << 29
    multiplied = 8192

    def __init__(self) -> None:
        self._filler = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def wait(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        self._filler.zero_()

    def elapsed_ms(self, call: Call, calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def peak_bytes(self, call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def captured(self, call: Call) -> Call:
        """The call's launches as one graph, after calls on a stream of their own, as torch asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


@cache
def clock_of(device: str) -> Host:
    return Cuda() if device == "cuda" else Host()
