"""Tables and pictures of what was measured on the CPU, from the JSON files of `pytest bench/ --benchmark` and sweep.py.

python bench/cpu_table.py FILE.json [--markdown FILE.md] [--picture FILE.png]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

WAYS = {
    "eager": "eager",
    "compile": "compile",
    "compile-autotuned": "autotuned",
    "fused": "fused",
    "stacked": "stacked",
}
FACTS = (
    "cpu",
    "instruction_set",
    "cores",
    "threads",
    "os",
    "torch",
    "compiler",
    "commit",
    "sources",
    "load_before",
    "date",
)

NOISY = 0.2


def header(record: dict[str, Any]) -> str:
    return "\n".join(f"{fact:<16}{record[fact]}" for fact in FACTS if fact in record)


def _ms(row: dict[str, Any], way: str) -> str:
    found = row["milliseconds"].get(way)
    mark = "!" if way in row.get("remarks", {}) else ""
    return "-" if found is None else f"{found['median']:.4g} ±{found['spread'] / 2:.0%}{mark}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------- the contest

CONTEST_COLUMNS = ("row", "pass", *WAYS.values(), "/eager", "/compile", "bar", "", "stacked/compile", "floors")


def contest_cells(row: dict[str, Any]) -> list[str]:
    """Milliseconds with half the interquartile range; how many times as fast as eager and as the best compilation."""
    verdict = {True: "met", False: "missed", None: ""}[row["is_met"]]
    stacked = row.get("stacked", {}).get("over_best_compile")
    times = [_ms(row, way) for way in WAYS]
    ratios = [_number(row["fused"]["over_eager"]), _number(row["fused"]["over_best_compile"])]
    bar = "" if row["bar"] is None else f"{row['bar']:g}"
    return [
        row["row"],
        row["pass"],
        *times,
        *ratios,
        bar,
        verdict,
        _number(stacked),
        _number(row["fused"]["over_floor"]),
    ]


def contest_line(row: dict[str, Any]) -> str:
    """One row, as it is measured."""
    times = ", ".join(f"{name} {_ms(row, way)}" for way, name in WAYS.items() if way in row["milliseconds"])
    cells = dict(zip(CONTEST_COLUMNS, contest_cells(row), strict=True))
    bar = f" (bar {cells['bar']}: {cells['']})" if cells["bar"] else ""
    said = "".join(f"; {way}: {why}" for way, why in _said(row))
    ratios = f"{cells['/eager']} times eager's speed, {cells['/compile']} times the best compile's{bar}"
    if row["floor_ms"] is not None:
        ratios += f", {cells['floors']} floors"
    return f"{row['row']} {row['pass']}: {times} ms; {ratios}{said}"


def _said(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [*row["failures"].items(), *row["remarks"].items()]


def contest_table(record: dict[str, Any]) -> str:
    rows = list(record["rows"].values())
    notes = [f"{row['row']} {row['pass']}, {way}: {why}" for row in rows for way, why in _said(row)]
    judged = [row for row in rows if row["is_met"] is not None]
    met = sum(row["is_met"] for row in judged)
    return "\n".join(
        [
            header(record),
            "Milliseconds, median ± half the interquartile range over rounds. /eager, /compile: how many times as fast",
            "fused is as eager and as the better compilation. floors: how many times the floor fused takes.",
            "!: its answer is further from float64 than ours may be; a note below says where.",
            columns(CONTEST_COLUMNS, [contest_cells(row) for row in rows]),
            *notes,
            f"{met} of {len(judged)} bars met",
        ]
    )


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


def sweep_picture(record: dict[str, Any], path: Path) -> None:
    """Heat maps M x width of eager's time over fused's, one for each depth and pass; blue is faster, red slower.

    A frame: slower beyond noise. Slanted: the dispatcher left the shape to eager.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import Rectangle

    rows = sweep_rows(record)
    Ms, widths, depths = (sorted({row[size] for row in rows}) for size in ("M", "width", "depth"))
    passes = [kind for kind in ("F", "FB") if any(row["pass"] == kind for row in rows)]
    titles = {"F": "forward", "FB": "forward + backward"}
    by_shape = {(row["pass"], row["depth"], row["M"], row["width"]): row for row in rows}
    logs = [math.log2(row["over_eager"]) for row in rows]
    low, high = max(-6.0, min(-1.0, *logs)), min(6.0, max(1.0, *logs))
    colours, norm = matplotlib.colormaps["RdBu"], TwoSlopeNorm(0, low, high)  # so that a little slower shows

    size = (1.5 + (0.5 * len(widths) + 0.4) * len(depths), 1.4 + (0.5 * len(Ms) + 0.7) * len(passes))
    figure, axes = plt.subplots(len(passes), len(depths), figsize=size, squeeze=False, layout="constrained")
    for kind, in_line in zip(passes, axes, strict=True):
        for depth, ax in zip(depths, in_line, strict=True):
            ax.set_facecolor("0.92")  # of a shape that was not measured
            for i, M in enumerate(Ms):
                for j, width in enumerate(widths):
                    if (row := by_shape.get((kind, depth, M, width))) is None:
                        continue
                    ratio = row["over_eager"]
                    face = colours(norm(min(high, max(low, math.log2(ratio)))))
                    is_dark = 0.3 * face[0] + 0.59 * face[1] + 0.11 * face[2] < 0.5
                    frame = {"edgecolor": "black", "linewidth": 2, "zorder": 2} if row["is_slower"] else {}
                    ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=face, **frame))
                    ax.text(
                        j,
                        i,
                        f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 1.95 else f"{ratio:.2f}",
                        ha="center",
                        va="center",
                        fontsize=7.5,
                        style="italic" if row["is_eager"] else "normal",
                        color="white" if is_dark else "black",
                        zorder=3,
                    )
            ax.set(xlim=(-0.5, len(widths) - 0.5), ylim=(-0.5, len(Ms) - 0.5))
            ax.set_xticks(range(len(widths)), map(str, widths), fontsize=7.5)
            ax.set_yticks(range(len(Ms)), map(str, Ms), fontsize=7.5)
            ax.tick_params(length=0)
            ax.set_title(f"{titles[kind]}, {depth} layer{'s' if depth > 1 else ''}", fontsize=9)
            if ax.get_subplotspec().is_first_col():
                ax.set_ylabel("rows", fontsize=8)
            if ax.get_subplotspec().is_last_row():
                ax.set_xlabel("width", fontsize=8)
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(norm, colours), ax=axes, fraction=0.03, pad=0.01)
    ticks = range(math.ceil(low), math.floor(high) + 1)
    bar.set_ticks(list(ticks), labels=[f"{2**k}" if k >= 0 else f"1/{2**-k}" for k in ticks], fontsize=7.5)
    bar.set_label("times as fast as eager", fontsize=8)
    figure.suptitle(
        f"Residual networks on {record['cpu']}, {record['threads']} threads: fused against eager PyTorch\n"
        "framed: slower than eager beyond noise;  slanted: the dispatcher chose eager",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
    if record["kind"] == "contest":
        names, rows = CONTEST_COLUMNS, [contest_cells(row) for row in record["rows"].values()]
    else:
        names, rows = SWEEP_COLUMNS, [sweep_cells(row) for row in sweep_rows(record)]
    lines = [list(names), ["---"] * len(names), *rows]
    facts = "\n".join(f"- {line}" for line in header(record).splitlines())
    return facts + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


TABLES = {"contest": contest_table, "sweep": sweep_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="of a sweep")
    options = parser.parse_args()

    record = json.loads(options.file.read_text())
    if record.get("kind") not in TABLES:
        parser.error(f"{options.file} must hold results of kind {' or '.join(TABLES)}, got {record.get('kind')}")
    print(TABLES[record["kind"]](record))
    if options.markdown:
        options.markdown.write_text(markdown(record))
    if options.picture:
        if record["kind"] != "sweep":
            parser.error(f"--picture expected a sweep's file, got one of kind {record['kind']}")
        sweep_picture(record, options.picture)


if __name__ == "__main__":
    main()
