"""The instructions that a kernel's threads issue for a tile, read in the machine code by its loops, without a GPU."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from typing import NamedTuple

from configurations import Configuration, FormConfiguration

MULTIPROCESSOR = 2048  # threads that one can have at a time
REGISTERS = 64 * 1024


class Issued(NamedTuple):
    """By a thread: for a tile, and for each step of the loops within it, in the order of the code.

    residents: programs for which a multiprocessor has registers, shared memory and threads.
    """

    per_tile: int
    per_step: list[int]
    threads: int
    residents: int


def issued(configuration: Configuration | FormConfiguration) -> Issued:
    """Of a plain layer with gelu on sm_90."""
    import launches  # not before kernels are to be compiled: with it, no kernel that is defined later is interpreted
    from compiled import ARCHES, NVDISASM, RESERVED, compiled, read

    job = launches.Job("sm_90", configuration, load=launches.PLAIN)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        built = compiled(launches.of(job), ARCHES["sm_90"], False)
    found = read(built, log.getvalue())
    if faults := found.faults("sm_90", getattr(configuration.tile, "residents", 1)):
        raise ValueError(f"{configuration} must fit its chip: {faults}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        sass = subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout
    per_tile, per_step = by_loops(sass)
    fits = min(
        REGISTERS // (found.threads * -(-found.registers // 8) * 8),
        (ARCHES["sm_90"].shared + RESERVED) // (found.shared + RESERVED),
        MULTIPROCESSOR // found.threads,
    )
    return Issued(per_tile, per_step, found.threads, fits)


def by_loops(sass: str) -> tuple[int, list[int]]:
    """Instructions of the loop over tiles less those of loops within it, and of each of these; all, where none loops.

    A loop is a branch backwards before the last exit: behind it are the waits that are seldom entered.
    """
    stems: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(stems)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            if found[1] == "BRA" and (target := re.search(r"\.L_\w+", found[2])):
                branches.append((len(stems), target[0]))
            stems.append(found[1])
    end = max(i for i, stem in enumerate(stems) if stem == "EXIT")
    loops = sorted((labels[target], at + 1) for at, target in branches if at < end and labels.get(target, at + 1) <= at)
    if not loops:
        return end + 1, []
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    within = [(a, b) for a, b in loops if first <= a and b <= last and (a, b) != (first, last)]
    outermost = [(a, b) for a, b in within if not any(c <= a and b <= d and (a, b) != (c, d) for c, d in within)]
    steps = [b - a for a, b in outermost]
    return last - first - sum(steps), steps
