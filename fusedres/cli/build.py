"""`fusedres build`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from .arguments import Answer, Parser, Wrong


def options(parser: Parser, rest: Sequence[str]) -> None:
    parser.add_argument(
        "--all-levels",
        action="store_true",
        help="for every instruction set the compiler knows, whatever this machine can run [the machine's own]",
    )


def run(options: argparse.Namespace) -> Answer:
    from .. import native, toolchain

    libraries: list[dict[str, Any]] = []
    try:
        for level in toolchain.accepted_levels() if options.all_levels else [toolchain.level()]:
            begin = time.perf_counter()
            path = native.build(level)
            seconds = time.perf_counter() - begin
            libraries.append({"level": level, "path": str(path), "seconds": seconds})
            print(f"{path}  {seconds:.1f} s", flush=True)
    except toolchain.Unavailable as error:
        raise Wrong(str(error)) from error
    return Answer(0, {"libraries": libraries})
