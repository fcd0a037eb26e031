"""`fusedres check`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from . import device
from .arguments import Answer, Parser, add_device, add_seed

WOULD_RUN = (
    "What would: on a CPU the C++ engine, with a C++ compiler on PATH or in CXX and FUSEDRES_NATIVE not 0; Triton, "
    "with a GPU that torch sees"
)
WORDS = {True: "ok", False: "FAILED", None: "-"}


def options(parser: Parser, rest: Sequence[str]) -> None:
    add_seed(parser)
    add_device(parser, "the CPU, and a GPU where there is one")
    parser.epilog = "Exit code 1: a check failed, or nothing fused runs on this machine."


def run(options: argparse.Namespace) -> Answer:
    import torch

    first = device.chosen(options)  # a GPU where there is one
    from .. import dispatch
    from . import selftest

    devices = [first] if options.device or first.type == "cpu" else [first, torch.device("cpu")]
    begin, found = time.perf_counter(), []
    for check in selftest.checks(devices, options.seed):
        print(f"{WORDS[check.holds]:6}  {check.where:14}  {check.what:28}  {check.measured}", flush=True)
        found.append(check)
    seconds = time.perf_counter() - begin
    failed = sum(check.holds is False for check in found)
    checked = sum(check.holds is not None for check in found)
    holds = bool(checked) and not failed
    if checked:
        said = f"{failed} of {checked} checks failed" if failed else f"all {checked} checks hold"
        print("a unit: eager's own error against float64, at least one rounding; of float64, 1024 roundings")
        print(f"{said}, in {seconds:.0f} s")
    else:
        print(f"FAILED: nothing fused runs here: {dispatch.backend(first, torch.float32).because}")
        print(WOULD_RUN)
    return Answer(0 if holds else 1, {"holds": holds, "seconds": seconds, "checks": [one._asdict() for one in found]})
