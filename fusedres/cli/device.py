"""Where a command runs, and whether Triton compiles or interprets there."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import streams
from .arguments import Wrong

if TYPE_CHECKING:
    import torch


def chosen(options: argparse.Namespace, is_interpreted: bool | None = None) -> torch.device:
    """The device of --device, or a GPU where there is one. On a CPU Triton interprets if told to, or as it is set."""
    import torch

    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise Wrong("--device cuda must be a GPU that torch sees: torch sees no CUDA device here")
    device = torch.device(options.device or ("cuda" if has_gpu else "cpu"))
    if device.type == "cuda":
        is_interpreted = False
    if is_interpreted is not None:
        set_interpreter(is_interpreted, options.arguments)
    return device


def set_interpreter(is_wanted: bool, arguments: Sequence[str]) -> None:
    """Has Triton interpret kernels, or compile them. It decides as it is imported: where it has been, start anew."""
    if is_wanted == (os.environ.get("TRITON_INTERPRET") == "1"):
        return
    os.environ["TRITON_INTERPRET"] = "1" if is_wanted else "0"
    if "triton" in sys.modules:
        streams.flush()
        streams.give_back()
        os.execv(sys.executable, [sys.executable, "-m", "fusedres", *arguments])
