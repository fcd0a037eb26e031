"""The process: text that no encoding stops, stdout for one document alone, a reader that goes away, Ctrl-C."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper, UnsupportedOperation
from typing import TextIO


class _Process:
    """What became of this process's streams."""

    stdout: int | None = None  # a duplicate of descriptor 1 while that points at stderr


def spell_out() -> None:
    """From here on what an encoding lacks is written as \\u03bb, and stops nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def kept_for_json() -> Iterator[None]:
    """What is printed meanwhile goes to stderr: by Python, by C and by processes that are started."""
    _divert()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        give_back()


def _divert() -> None:
    try:
        descriptors = sys.stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, UnsupportedOperation):  # closed, or a program's around this one
        return
    if descriptors == (1, 2):
        sys.stdout.flush()
        _Process.stdout = os.dup(1)
        os.dup2(2, 1)


def give_back() -> None:
    """Descriptor 1 is stdout again, if it was not; to be called before another program takes this process over, too."""
    if _Process.stdout is not None:
        ctypes.CDLL(None).fflush(None)  # C keeps what it prints until then where nobody looks on
        os.dup2(_Process.stdout, 1)
        os.close(_Process.stdout)
        _Process.stdout = None


@contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Ctrl-C that falls into a finaliser, where Python prints what is raised and goes on, comes again after it."""
    printed = sys.unraisablehook

    def again(found: sys.UnraisableHookArgs) -> None:
        if issubclass(found.exc_type, KeyboardInterrupt):
            main = threading.main_thread().ident
            threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            printed(found)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = printed


def flush() -> None:
    """So that a reader that went away is noticed now, and not as Python ends."""
    if sys.stdout:
        sys.stdout.flush()


def abandon() -> bool:
    """Whether a stream cannot be written, its reader gone or its disk full; what it still holds then goes nowhere."""
    broken = [stream for stream in (sys.stdout, sys.stderr) if _is_broken(stream)]
    for stream in broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(broken)


def _is_broken(stream: TextIO | None) -> bool:
    try:
        descriptor = stream.fileno()
    except (AttributeError, UnsupportedOperation):
        return False
    try:
        stream.flush()
    except OSError:
        return True
    reader = select.poll()  # what could not be written may be lost, and nothing be left to flush
    reader.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in reader.poll(0))
