"""Tables and pictures of what was measured, from the JSON files of `pytest bench/ --benchmark` and sweep.py.

python bench/report.py FILE.json [--markdown FILE.md] [--pictures FOLDER]
python bench/report.py --readme            writes README.md's table of what was measured, from the committed files
python bench/report.py --readme --check    exits with 1 where it says otherwise than they do
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

WAYS = {
    "eager": "eager",
    "compile": "compile",
    "compile-autotuned": "autotuned",
    "cublaslt": "cuBLASLt",
    "fused": "fused",
    "recomputed": "recomputed",
    "stacked": "stacked",
}
VIEWS = ("host", "cold", "warm", "graph")
FACTS = (
    "gpu",
    "driver",
    "ptxas",
    "cpu",
    "instruction_set",
    "cores",
    "threads",
    "os",
    "python",
    "torch",
    "triton",
    "compiler",
    "commit",
    "sources",
    "load_before",
    "date",
)

NOISY = 0.2


def header(record: dict[str, Any]) -> str:
    lines = [f"{fact:<16}{record[fact]}" for fact in FACTS if fact in record]
    for device, dtypes in record.get("peaks", {}).items():
        for dtype, peak in dtypes.items():
            name = f"{device} {dtype}"
            reached = (
                f"{peak['bytes_per_s'] / 1e9:.4g} GB/s copied, {peak['flops_per_s'] / 1e12:.3g} TFLOP/s multiplied"
            )
            lines.append(f"{name:<16}{reached}")
    return "\n".join(lines)


def times_of(row: dict[str, Any], view: str | None = None) -> dict[str, dict[str, float]]:
    """{way: its times} in a view, by default the one that the row's ratios are of; {} where it was not looked at."""
    view = view or row.get("headline", "host")
    return row["milliseconds"] if view == "host" else row.get("device_milliseconds", {}).get(view, {})


def _ms(row: dict[str, Any], way: str, view: str | None = None) -> str:
    found = times_of(row, view).get(way)
    mark = "!" if way in row.get("remarks", {}) else ""
    return "-" if found is None else f"{found['median']:.4g} ±{found['spread'] / 2:.0%}{mark}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------- the contest


def contest_cells(row: dict[str, Any], ways: list[str]) -> dict[str, str]:
    """Milliseconds with half the interquartile range; how many times as fast as eager and as the best compilation."""
    ours = row["fused"]
    share = row.get("rates", {}).get("fused", {}).get("share_of_roofline")
    return {
        "row": row["row"],
        "on": row.get("device", "cpu"),
        "pass": row["pass"],
        **{WAYS[way]: _ms(row, way) for way in ways},
        "/eager": _number(ours["over_eager"]),
        "/compile": _number(ours["over_best_compile"]),
        "bar": "" if row["bar"] is None else f"{row['bar']:g}",
        "": {True: "met", False: "missed", None: ""}[row["is_met"]],
        "stacked/compile": _number(row.get("stacked", {}).get("over_best_compile")),
        "floors": _number(ours["over_floor"]),
        "roof": "-" if share is None else f"{share:.0%}",
    }


def contest_line(row: dict[str, Any]) -> str:
    """One row, as it is measured."""
    ways = [way for way in WAYS if way in times_of(row)]
    cells = contest_cells(row, ways)
    times = ", ".join(f"{WAYS[way]} {cells[WAYS[way]]}" for way in ways)
    bar = f" (bar {cells['bar']}: {cells['']})" if cells["bar"] else ""
    said = "".join(f"; {way}: {why}" for way, why in _said(row))
    ratios = f"{cells['/eager']} times eager's speed, {cells['/compile']} times the best compile's{bar}"
    if row["floor_ms"] is not None:
        ratios += f", {cells['floors']} floors"
    return f"{row['row']} {row['pass']}: {times} ms; {ratios}{said}"


def _said(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [*row["failures"].items(), *row["remarks"].items()]


def _ways(rows: list[dict[str, Any]]) -> list[str]:
    return [way for way in WAYS if any(way in times_of(row) for row in rows)]


def contest_table(record: dict[str, Any]) -> str:
    rows = list(record["rows"].values())
    cells = [contest_cells(row, _ways(rows)) for row in rows]
    notes = [f"{row['row']} {row['pass']}, {way}: {why}" for row in rows for way, why in _said(row)]
    judged = [row for row in rows if row["is_met"] is not None]
    met = sum(row["is_met"] for row in judged)
    if left_out := record.get("left_out"):
        notes.append(f"no time for {len(left_out)}: {', '.join(left_out)}")
    return "\n".join(
        [
            header(record),
            "Milliseconds, median ± half the interquartile range over rounds: wall time on a CPU, on CUDA device time,",
            "its cache cold. /eager, /compile: how many times as fast fused is as eager and as the better compilation.",
            "floors: how many times the floor fused takes. roof: its share of what this machine reaches in a copy or a",
            "product, the tighter of the two; above 100% what must be moved comes out of a cache.",
            "!: its answer is further from float64 than ours may be; a note below says where.",
            columns(tuple(cells[0]) if cells else ("row",), [list(of.values()) for of in cells]),
            *notes,
            f"{met} of {len(judged)} bars met",
        ]
    )


def detail_cells(row: dict[str, Any]) -> list[dict[str, str]]:
    """Everything of every way: its times by view, its rates, memory and first call."""
    found = []
    for way in (way for way in WAYS if way in times_of(row)):
        rates, peak = row.get("rates", {}).get(way, {}), row.get("peak_bytes", {}).get(way)
        share, first_s = rates.get("share_of_roofline"), row.get("first_call_s", {}).get(way)
        found.append(
            {
                "row": row["row"],
                "on": row.get("device", "cpu"),
                "pass": row["pass"],
                "way": WAYS[way],
                **{view: _ms(row, way, view) for view in VIEWS},
                "TFLOP/s": _number(rates.get("tflop_per_s")),
                "GB/s": _number(rates.get("gb_per_s")),
                "roof": "-" if share is None else f"{share:.0%}",
                "peak MiB": "-" if peak is None else f"{peak / 2**20:.1f}",
                "first call s": "-" if first_s is None else f"{first_s:g}",
            }
        )
    return found


def detail_table(record: dict[str, Any]) -> str:
    cells = [of for row in record["rows"].values() for of in detail_cells(row)]
    return columns(tuple(cells[0]) if cells else ("row",), [list(of.values()) for of in cells])


# ---------------------------------------------------------------------------------------------- the sweep

SWEEP_COLUMNS = ("M", "width", "depth", "pass", "eager", "fused", "/eager", "", "chosen")


def sweep_cells(row: dict[str, Any]) -> list[str]:
    times = [_ms(row, way) for way in ("eager", "fused")]
    verdict = "SLOWER" if row["is_slower"] else ""
    shape = [str(row[size]) for size in ("M", "width", "depth")]
    return [*shape, row["pass"], *times, _number(row["over_eager"]), verdict, row["chosen"]]


def sweep_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(record["rows"].values(), key=lambda row: (row["pass"], row["depth"], row["width"], row["M"]))


def sweep_table(record: dict[str, Any]) -> str:
    rows = sweep_rows(record)
    slower = sum(row["is_slower"] for row in rows)
    least = min((row["over_eager"] for row in rows), default=math.nan)
    noisy = sum(any(t["spread"] > NOISY for t in row["milliseconds"].values()) for row in rows)
    return "\n".join(
        [
            header(record),
            "Milliseconds, median ± half the interquartile range over rounds. /eager: how many times as fast fused is.",
            columns(SWEEP_COLUMNS, [sweep_cells(row) for row in rows]),
            f"{slower} of {len(rows)} slower than eager beyond noise; the least ratio is {least:.3g}",
            f"{noisy} with quartiles more than {NOISY:.0%} of the median apart, which tell little",
        ]
    )


# ---------------------------------------------------------------------------------------------- either


def columns(names: tuple[str, ...], rows: list[list[str]]) -> str:
    """Numbers to the right, the first and the last column to the left."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    last = len(names) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [list(names), *rows]
    )


def markdown(record: dict[str, Any]) -> str:
    rows = list(record["rows"].values())
    facts = "\n".join(f"- {line}" for line in header(record).splitlines())
    if record["kind"] == "sweep":
        return f"{facts}\n\n{_markdown_table(SWEEP_COLUMNS, [sweep_cells(row) for row in sweep_rows(record)])}"
    tables = ([contest_cells(row, _ways(rows)) for row in rows], [of for row in rows for of in detail_cells(row)])
    said = [_markdown_table(tuple(cells[0]), [list(of.values()) for of in cells]) for cells in tables if cells]
    return "\n\n".join([facts, *said])


def _markdown_table(names: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(names), ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def said_of(record: dict[str, Any]) -> str:
    """Every table of a record."""
    return sweep_table(record) if record["kind"] == "sweep" else f"{contest_table(record)}\n\n{detail_table(record)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE.json")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER")
    parser.add_argument("--readme", action="store_true", help="write README.md's table")
    parser.add_argument("--check", action="store_true", help="with --readme: only say whether it is the files'")
    options = parser.parse_args()
    if (options.file is None) != options.readme or (options.check and not options.readme):
        parser.error("either FILE.json or --readme [--check] expected")
    if options.readme:
        import readme

        return readme.check() if options.check else readme.write()

    record = json.loads(options.file.read_text())
    if record.get("kind") not in ("contest", "sweep"):
        parser.error(f"{options.file} must hold results of kind contest or sweep, got {record.get('kind')}")
    print(said_of(record))
    if options.markdown:
        options.markdown.write_text(markdown(record))
    if options.pictures:
        import pictures

        for path in pictures.draw(record, options.pictures, options.file.stem):
            print(f"drawn: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
