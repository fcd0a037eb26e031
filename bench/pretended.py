"""A GPU that is not there: kernels are compiled for it and launched, up to Triton's launcher, which does nothing.

What a call then takes is all that it costs the host, but for the launcher's own part. Memory is the CPU's, and what
comes out is whatever was in it before.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # triton reads it as it defines kernels

import triton
from triton.backends.compiler import GPUTarget

from fusedres import dispatch, plain_layer

MULTIPROCESSORS, SHARED = 132, 227 * 1024  # an H100's, and the bytes that one program can have
DEVICE = 1000  # what Triton and our launches keep by device is not mixed with a real one's


class Launched(NamedTuple):
    """A launch as it reached the launcher: a compiled kernel, how many programs, every argument, constants too."""

    kernel: str
    programs: int
    arguments: tuple[Any, ...]


class Driver:
    """What Triton asks of a driver; `launched` has the launches while it is a list."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, *_: (1, f"{name} {hashlib.sha256(binary).hexdigest()}", 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": SHARED},
        )
        self.launched: list[Launched] | None = None

    def launcher_cls(self, source: object, metadata: object) -> Any:
        return self._launch

    def _launch(self, programs: int, _y: int, _z: int, _stream: int, function: str, *given: Any) -> None:
        if self.launched is not None:
            self.launched.append(Launched(function, programs, given[4:]))  # after what hooks of a launch are given

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return DEVICE + self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@cache
def _driver(capability: int) -> Driver:
    """One for each: compiled kernels keep its launcher."""
    return Driver(capability)


@contextmanager
def pretended(capability: int = 90) -> Iterator[Driver]:
    """Within it tensors on the CPU are run by the kernels for such a GPU."""
    driver, before = _driver(capability), triton.runtime.driver._active
    choice = dispatch.Triton("it is pretended", "cuda", capability, "pretended")
    triton.runtime.driver.set_active(driver)
    plain_layer.forget()
    try:
        with (
            mock.patch.object(dispatch, "_cached_backend", _always(choice)),
            mock.patch.object(dispatch, "multiprocessors", _always(MULTIPROCESSORS)),
        ):
            yield driver
    finally:
        triton.runtime.driver._active = before
        plain_layer.forget()


def _always(value: Any) -> Callable[..., Any]:
    """A mock would take longer than what it stands for."""
    return lambda *_: value
