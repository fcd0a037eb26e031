"""Giving up on a compilation that takes too long, and ending the compilers that it leaves behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch


class TooLong(BaseException):
    """Not an Exception, which compilers catch and wrap."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooLong within the block when its time is up, and again each half minute until the block is left.

    Not sooner: what the block has to tidy up as it is left would be interrupted too.
    """
    if seconds <= 0:
        raise TooLong

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 30.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def abandon_compilation() -> None:
    """After TooLong: ends the compilers that threads of this process still wait for, which would be in later figures.

    Raises RuntimeError where the interruption left torch in a mode that changes what is measured.
    """
    until = time.perf_counter() + 10
    quiet = 0
    while quiet < 5 and time.perf_counter() < until:
        found = _child_compilers()
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        quiet = 0 if found else quiet + 1
        time.sleep(0.1)
    torch._dynamo.reset()
    if torch.is_anomaly_enabled() or not torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
        raise RuntimeError("an interrupted torch.compile left its modes behind: leave it out with a limit of 0 s")


def _child_compilers() -> list[int]:
    """The processes below this one that are a compiler, by what Linux says of them; elsewhere none."""
    parents, names = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, rest = stat.read_text().rpartition(")")
            number, _, name = head.partition(" (")
            state, parent = rest.split()[:2]
            if state != "Z":
                parents[int(number)], names[int(number)] = int(parent), name

    def is_below(process: int) -> bool:
        while process in parents and process != os.getpid():
            process = parents[process]
        return process == os.getpid()

    is_compiler = re.compile(r"(cc1plus|as|ld|collect2|lld|(.*-)?(c\+\+|g\+\+|clang)(\+\+)?(-[\d.]+)?)").fullmatch
    return [process for process, name in names.items() if is_compiler(name) and is_below(process)]
