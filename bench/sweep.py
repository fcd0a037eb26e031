"""Is any shape slower than eager? Residual networks over rows, widths and depths, forward and forward + backward.

    python bench/sweep.py --out sweep.json --picture sweep.png
    python bench/sweep.py --budget 5 --rows 1 7 --widths 1 16 --depths 1          does the script work?

Exits with 1 if some shape is slower beyond noise: its lower quartile above eager's upper quartile by more than NOISE,
and so again when it is measured once more. Shapes come by weight, the lightest first; what the budget leaves out
is said, and found by the next run with the same --out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import answers
import opponents
import torch
from cases import Row
from report import sweep_table
from timing import Quartiles, Results, in_turns

SWEEP_ROWS = (1, 7, 64, 1000, 20000)
SWEEP_WIDTHS = (1, 3, 16, 33, 64, 100, 128, 257, 512, 1024)
SWEEP_DEPTHS = (1, 4, 32)
KINDS = ("F", "FB")
NOISE = 1.03
SHARE = 1 / 450  # of the budget that the rounds of one shape and pass take: 300 of them, and room for the heaviest
LEAST_ROUNDS = 3
CHECKED_FLOPS = 2e11  # a network whose answer in float64 takes more is not checked here, but in the tests


def sweep(
    rows: tuple[int, ...] = SWEEP_ROWS, widths: tuple[int, ...] = SWEEP_WIDTHS, depths: tuple[int, ...] = SWEEP_DEPTHS
) -> Iterator[Row]:
    """Networks of `depth` layers [width, width], each with its skip; the lightest first."""
    shapes = sorted((M * w * (w + 64) * depth, M, w, depth) for M in rows for w in widths for depth in depths)
    for _, M, width, depth in shapes:
        yield Row(f"{M}x{width}x{depth}", (width,) * (depth + 1), M)


def measured(row: Row, kind: str, rounds_s: float) -> dict[str, Any]:
    """Both medians, whether ours is slower beyond noise, and what the dispatcher chose."""
    module, x, target = opponents.draw(row)
    contenders = {"eager": opponents.of_module(module), "fused": opponents.fused(module, row)}
    if row.work("F").flops < CHECKED_FLOPS:
        own, ours = (contender.answer(kind, x, target) for contender in contenders.values())
        exact = opponents.truth(module, row, kind, x, target)
        if wrong := answers.wrong(answers.errors(ours, own, exact, row.depth)):
            raise AssertionError(f"{row} {kind}: " + "\n".join(wrong[:10]))
        del own, ours, exact
    calls = {way: contender.call(kind, x, target) for way, contender in contenders.items()}
    with torch.no_grad() if kind == "F" else nullcontext():
        times = in_turns(calls, rounds_s, least=LEAST_ROUNDS)
        if is_slower(times):
            times = in_turns(calls, 2 * rounds_s, least=2 * LEAST_ROUNDS)
    chosen = opponents.chosen(contenders["fused"].network, x)
    return {
        "M": row.M,
        "width": row.sizes[0],
        "depth": row.depth,
        "pass": kind,
        "milliseconds": {way: {**t._asdict(), "spread": t.spread} for way, t in times.items()},
        "over_eager": times["eager"].median / times["fused"].median,
        "is_slower": is_slower(times),
        "is_eager": chosen.is_eager,
        "chosen": chosen.line,
    }


def is_slower(times: dict[str, Quartiles]) -> bool:
    return times["fused"].lower > NOISE * times["eager"].upper


def in_progress(todo: list[tuple[Row, str]]) -> Iterator[tuple[Row, str]]:
    """The same, with a bar on a terminal that has tqdm, else a line now and then."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is not None and sys.stderr.isatty():
        yield from tqdm(todo, unit="shape")
        return
    begin = said = time.perf_counter()
    for i, one in enumerate(todo):
        yield one
        now = time.perf_counter()
        if now - said > 15 or i + 1 == len(todo):
            print(f"{i + 1} of {len(todo)}, {now - begin:.0f} s: {one[0]} {one[1]}", flush=True)
            said = now


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; rows found in it are kept")
    parser.add_argument("--again", action="store_true", help="measure rows that the file has too")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    parser.add_argument("--budget", type=float, default=1500.0, metavar="SECONDS", help="no shape begins later")
    parser.add_argument("--rows", type=int, nargs="+", default=SWEEP_ROWS)
    parser.add_argument("--widths", type=int, nargs="+", default=SWEEP_WIDTHS)
    parser.add_argument("--depths", type=int, nargs="+", default=SWEEP_DEPTHS)
    options = parser.parse_args()

    begin = time.perf_counter()
    try:
        results = Results(options.out, "sweep", options.again)
    except ValueError as wrong:
        parser.error(str(wrong))
    every = [(row, kind) for row in sweep(options.rows, options.widths, options.depths) for kind in KINDS]
    todo = [(row, kind) for row, kind in every if not results.is_done(f"{row}-{kind}")]
    if kept := len(every) - len(todo):
        print(f"{kept} of {len(every)} are in {options.out} and kept")
    done = 0
    for row, kind in in_progress(todo):
        if time.perf_counter() - begin > options.budget:
            break
        found = measured(row, kind, options.budget * SHARE)
        results.add(f"{row}-{kind}", found)
        if found["is_slower"]:
            print(f"{row} {kind}: slower, {found['over_eager']:.3g} times eager's speed: {found['chosen']}", flush=True)
        done += 1

    print(sweep_table(results.record))
    if done < len(todo):
        print(f"{len(todo) - done} left out: the budget of {options.budget:g} s is used up; run again with --out")
    if options.picture:
        from pictures import sweep_picture  # which needs matplotlib

        sweep_picture(results.record, options.picture)
    slower = [name for name, found in results.rows.items() if found["is_slower"]]
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
