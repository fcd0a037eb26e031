"""Peak memory of forward + backward: eager PyTorch against the fused network that keeps activations, and that does not.

    python bench/memory.py [--row c65536 ...] [--json FILE]

Each way in a process of its own. Counted is what one step (forward, mean squared error, backward) adds at its highest
to what the process held resident before: network and input were there, one row had gone through. Gradients are in it.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import cases
import opponents
from timing import host

WAYS = ("eager", "recompute", "keep", "auto")
RECOMPUTE = {"recompute": True, "keep": False, "auto": "auto"}
STATUS = Path("/proc/self/status")


def peak_growth(way: str, row: cases.Row) -> dict[str, int | bool]:
    """Bytes that a step of this way adds at its highest, measured in this process, which is to do nothing else."""
    module, x, target = opponents.draw(row)
    if way == "eager":
        contender = opponents.of_module(module)
    else:
        build = opponents.stacked if row.can_stack else opponents.fused
        contender = build(module, row, recompute=RECOMPUTE[way])
    contender.step(x[:1], target[:1])  # loads what is loaded at first use
    contender.clear()
    is_reset = _reset_peak()
    before = _resident("VmRSS")
    contender.step(x, target)
    return {"bytes": _resident("VmHWM") - before, "is_reset": is_reset}


def _reset_peak() -> bool:
    """Whether the kernel forgot the highest resident memory so far; else that of the start may hide ours."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", STATUS.read_text(), re.M)
    if found is not None:
        return 1024 * int(found[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # some kernels do not say VmHWM


def in_own_process(way: str, name: str, rows: int | None) -> dict[str, int | bool]:
    command = [sys.executable, __file__, "--row", name, "--way", way, *(["--rows", str(rows)] if rows else [])]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{way} ended with {run.returncode}:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs="+", default=["c65536"], metavar="ROW", help="of cases.py")
    parser.add_argument("--rows", type=int, metavar="M", help="of x, in the place of the row's own")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--way", choices=WAYS, help="measure one in this process, and print it as JSON")
    options = parser.parse_args()

    rows = [cases.named(name).shrunk(options.rows or sys.maxsize) for name in options.row]
    if options.way:
        print(json.dumps(peak_growth(options.way, rows[0])))
        return
    networks = {}
    for row in rows:
        peaks = {way: in_own_process(way, row.name, options.rows) for way in WAYS}
        eager = peaks["eager"]["bytes"]
        print(f"{row}, {row.depth} layers up to {max(row.sizes)} wide, {row.M} rows: what a step adds at its highest")
        for way, peak in peaks.items():
            note = (
                ""
                if peak["is_reset"]
                else "   (this kernel does not reset its mark: the process's highest, not the step's)"
            )
            print(f"    {way:<10}{peak['bytes'] / 2**20:9.1f} MiB {peak['bytes'] / eager:7.3f} of eager{note}")
        ratios = {way: peak["bytes"] / eager for way, peak in peaks.items()}
        networks[row.name] = {"sizes": row.sizes, "M": row.M, "peaks": peaks, "over_eager": ratios}
    if options.json:
        options.json.write_text(json.dumps({"kind": "memory", **host(), "rows": networks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
