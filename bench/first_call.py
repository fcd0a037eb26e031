"""Seconds until the CPU engine stands: built in an empty cache, and found again by the next process.

    python bench/first_call.py [--times 3] [--json FILE]

Each in a process of its own, from before `import fusedres` to after its first call; importing torch is counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from timing import host

PROGRAM = """
import time; begin = time.perf_counter()
import torch; imported = time.perf_counter()
from fusedres import Network, native
weight, x = torch.randn(8, 8), torch.randn(4, 8)
first = time.perf_counter(); Network([weight])(x); end = time.perf_counter()
assert native.missing() is None, native.missing()
print(imported - begin, first - imported, end - first)
"""
PARTS = ("import torch", "import fusedres", "first call")


def seconds(cache: str) -> dict[str, float]:
    environment = os.environ | {"FUSEDRES_CACHE": cache, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return dict(zip(PARTS, map(float, run.stdout.split()), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"built": [], "found again": []}
    for _ in range(options.times):
        with tempfile.TemporaryDirectory() as cache:
            for name, runs in found.items():
                runs.append(seconds(cache))
                print(f"{name:<12}" + "   ".join(f"{part} {s:.3g} s" for part, s in runs[-1].items()), flush=True)
    medians = {name: {part: median(run[part] for run in runs) for part in PARTS} for name, runs in found.items()}
    if options.json:
        options.json.write_text(
            json.dumps({"kind": "first call", **host(), "medians": medians, "runs": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
