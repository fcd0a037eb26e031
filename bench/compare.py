"""What changed between two files of results beyond noise.

    python bench/compare.py BEFORE.json AFTER.json [--any-machine] [--way fused stacked]

A row's way is slower beyond noise where AFTER's lower quartile is above BEFORE's upper quartile by more than 3 %, the
rule by which bench/sweep.py calls a shape slower than eager; and quicker where it is so the other way round. Compared
is the view that a row's ratios are of. Every way that changed is listed; fusedres's own decide the exit code, or those
that --way names: what others take tells how far the machine itself was another.

Exits with 0 where nothing is slower beyond noise, 1 where something is, 2 where the files cannot be compared: of
another kind or machine, or without a row in common.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from report import columns, times_of

NOISE = 1.03
OURS = ("fused", "recomputed", "stacked")
MACHINE = ("cpu", "cores", "threads", "gpu")
VERSIONS = ("torch", "triton", "compiler", "python", "os", "driver", "ptxas")
KINDS = ("contest", "sweep")


class Incomparable(Exception):
    """Two files of which nothing can be said together."""


class Change(NamedTuple):
    """One way in one row: both medians in milliseconds, and slower, quicker or nothing beyond noise."""

    row: str
    way: str
    before_ms: float
    after_ms: float
    verdict: str

    @property
    def ratio(self) -> float:
        return self.after_ms / self.before_ms


def changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """Every way of every row that both records have."""
    for name in (name for name in before["rows"] if name in after["rows"]):
        old, new = before["rows"][name], after["rows"][name]
        view = old.get("headline", "host")
        earlier, later = times_of(old, view), times_of(new, view)
        for way in (way for way in earlier if way in later):
            yield Change(name, way, earlier[way]["median"], later[way]["median"], verdict(earlier[way], later[way]))


def verdict(before: dict[str, float], after: dict[str, float]) -> str:
    if after["lower"] > NOISE * before["upper"]:
        return "slower"
    return "quicker" if before["lower"] > NOISE * after["upper"] else ""


def check_comparable(before: dict[str, Any], after: dict[str, Any], any_machine: bool) -> None:
    """Raises Incomparable, with the reason."""
    kinds = [record.get("kind") for record in (before, after)]
    if kinds[0] != kinds[1] or kinds[0] not in KINDS:
        raise Incomparable(f"both must hold results of one kind, {' or '.join(KINDS)}, got {kinds[0]} and {kinds[1]}")
    others = [fact for fact in MACHINE if before.get(fact) != after.get(fact)]
    if others and not any_machine:
        said = "; ".join(f"{fact}: {before.get(fact)}, {after.get(fact)}" for fact in others)
        raise Incomparable(f"both must be of one machine (or --any-machine given), got {said}")
    if not any(True for _ in changes(before, after)):
        raise Incomparable("the files have no row and way in common")


def report(before: dict[str, Any], after: dict[str, Any], found: list[Change]) -> str:
    lines = [
        f"{fact}: {before.get(fact)}, then {after.get(fact)}"
        for fact in (*MACHINE, *VERSIONS, "commit", "sources")
        if before.get(fact) != after.get(fact)
    ]
    cells = [
        [
            change.row,
            change.way,
            f"{change.before_ms:.4g}",
            f"{change.after_ms:.4g}",
            f"{change.ratio:.3f}",
            change.verdict,
        ]
        for change in sorted(found, key=lambda change: -change.ratio)
        if change.verdict
    ]
    lines.append(columns(("row", "way", "before ms", "after ms", "ratio", "beyond noise"), cells))
    for name, one, other in (("before", before, after), ("after", after, before)):
        if alone := [row for row in one["rows"] if row not in other["rows"]]:
            lines.append(f"only {name}: {', '.join(alone)}")
    counts = [sum(change.verdict == verdict for change in found) for verdict in ("slower", "quicker", "")]
    lines.append("{} slower, {} quicker, {} the same within noise".format(*counts))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    parser.add_argument("--any-machine", action="store_true", help="compare what was measured on different machines")
    parser.add_argument("--way", nargs="+", default=OURS, metavar="WAY", help="that decide the exit code")
    options = parser.parse_args()

    try:
        before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
        check_comparable(before, after, options.any_machine)
    except (OSError, ValueError, Incomparable) as why:
        print(f"cannot be compared: {why}", file=sys.stderr)
        return 2
    found = list(changes(before, after))
    print(report(before, after, found))
    slower = [change for change in found if change.verdict == "slower" and change.way in options.way]
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
