"""Pictures of what was measured: speed-ups over width and batch, the roofline, and the sweep's map."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
from report import sweep_rows, times_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Rectangle

PASSES = {"F": "forward", "FB": "forward + backward", "S": "full step"}
FAMILIES = {"network": "networks", "layer": "layers", "stack": "stacks", "mlp": "blocks of two layers"}
COLOURS = {"network": "C0", "layer": "C1", "stack": "C2", "mlp": "C3"}


def draw(record: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """All pictures of a record, as folder/stem-….png."""
    folder.mkdir(parents=True, exist_ok=True)
    if record["kind"] == "sweep":
        sweep_picture(record, path := folder / f"{stem}-map.png")
        return [path]
    drawn = []
    for name, picture in (("speedup", speedup_picture), ("roofline", roofline_picture)):
        if picture(record, path := folder / f"{stem}-{name}.png"):
            drawn.append(path)
    return drawn


def _where(record: dict[str, Any]) -> str:
    rows = record["rows"].values()
    on_cuda = any(row.get("device") == "cuda" for row in rows)
    return record["gpu"] if on_cuda else f"{record['cpu']}, {record['threads']} threads"


# ---------------------------------------------------------------------------------------------- speed-ups


def speedup_picture(record: dict[str, Any], path: Path) -> bool:
    """Eager's and the best compilation's time over ours: layers over width, stacks over the batch, others by name.

    Ours is the quicker of fused and stacked. Filled: over the better compilation; hollow: over eager.
    """
    rows = list(record["rows"].values())
    there = {(row.get("device", "cpu"), row.get("family", "network")) for row in rows}
    panels = [(device, family) for device in ("cpu", "cuda") for family in FAMILIES if (device, family) in there]
    kinds = [kind for kind in PASSES if any(row["pass"] == kind for row in rows)]
    if not rows:
        return False
    heights = [1.3 if family in ("network", "mlp") else 1.0 for _, family in panels]
    figure, axes = plt.subplots(
        len(panels),
        len(kinds),
        figsize=(2.2 + 4.4 * len(kinds), 0.8 + 3.0 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for (device, family), in_line in zip(panels, axes, strict=True):
        for kind, ax in zip(kinds, in_line, strict=True):
            panel = (device, family, kind)
            found = [
                row for row in rows if (row.get("device", "cpu"), row.get("family", "network"), row["pass"]) == panel
            ]
            if not found:
                ax.set_axis_off()
                continue
            _speedups(ax, found, family)
            ax.set_title(f"{FAMILIES[family]}, {device}: {PASSES[kind]}", fontsize=9)
            last = ax
        if last.get_legend_handles_labels()[0]:
            last.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(
        f"fusedres on {_where(record)}: how many times as fast\n"
        "filled: as the better of torch.compile's two modes;  hollow: as eager PyTorch",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def speedup(row: dict[str, Any], over: str) -> float | None:
    """Over eager or best_compile, of the quicker of our ways."""
    found = [row[way][f"over_{over}"] for way in ("fused", "stacked") if way in row]
    return max((ratio for ratio in found if ratio is not None), default=None)


def _speedups(ax: Axes, rows: list[dict[str, Any]], family: str) -> None:
    if family in ("layer", "stack"):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            lines.setdefault(_line_of(row, family), []).append(row)
        over = "width" if family == "layer" else "M"
        for i, (label, of) in enumerate(lines.items()):
            of.sort(key=lambda row: row[over])
            _both(ax, [row[over] for row in of], of, f"C{i % 10}", label, "-")
        ax.set_xscale("log", base=2)
        ax.set_xlabel("width" if family == "layer" else "rows", fontsize=8)
        ticks = sorted({row[over] for row in rows})
        ax.set_xticks(ticks, [_short(tick) for tick in ticks], fontsize=7)
        ax.set_xticks([], minor=True)
    else:
        _both(ax, list(range(len(rows))), rows, COLOURS[family], None, "none")
        names = [row["row"].removeprefix("mlp-") for row in rows]
        ax.set_xticks(range(len(rows)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=6.5)
        ax.set_xlim(-0.7, max(len(rows) - 0.3, 0.7))
    ax.axhline(1, color="0.4", linewidth=0.8)
    ax.set_yscale("log", base=2)
    low, high = ax.get_ylim()
    low, high = min(low, 0.8), max(high, 2.2)
    steps = (1.0, 1.25, 1.5, 1.75) if high < 5 * low else (1.0, 1.5) if high < 40 * low else (1.0,)
    ticks = [2.0**k * step for k in range(math.floor(math.log2(low)), math.ceil(math.log2(high))) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    ax.set_ylim(low, high)
    ax.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks], fontsize=7)
    ax.set_yticks([], minor=True)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _line_of(row: dict[str, Any], family: str) -> str:
    dtype = row["dtype"].replace("float", "fp").replace("bfp", "bf")
    if family == "stack":
        return f"{row['width']} × {row['depth']}, {dtype}"
    return f"{row['M']} rows, {row['activation']}, {dtype}"


def _both(ax: Axes, x: list[float], rows: list[dict[str, Any]], colour: str, label: str | None, line: str) -> None:
    """What is known of the rows' speed-ups over both, in one colour and with one label."""
    for over, fill, style in (("best_compile", colour, line), ("eager", "white", ":" if line == "-" else line)):
        points = [(at, ratio) for at, row in zip(x, rows, strict=True) if (ratio := speedup(row, over)) is not None]
        if points:
            look = {"linestyle": style, "linewidth": 1, "marker": "o", "markersize": 4, "markerfacecolor": fill}
            ax.plot(*zip(*points, strict=True), color=colour, label=label, **look)
            label = None


def _short(number: int) -> str:
    return str(number) if number < 1 << 14 else f"{number >> 10}k" if number < 1 << 20 else f"{number >> 20}M"


# ---------------------------------------------------------------------------------------------- the roofline


def roofline_picture(record: dict[str, Any], path: Path) -> bool:
    """Achieved TFLOP/s against flops per byte, by `Row.work`, under what this machine's copy and product reach.

    One panel for each device and dtype whose ceilings were measured; colours are families, hollow is the best other.
    """
    rows = [row for row in record["rows"].values() if row.get("rates")]
    panels = [(device, dtype) for device, dtypes in record.get("peaks", {}).items() for dtype in dtypes]
    panels = [at for at in panels if any((row["device"], row["dtype"]) == at for row in rows)]
    if not panels:
        return False
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1 + 5.6 * len(panels), 4.8), squeeze=False, layout="constrained"
    )
    for (device, dtype), ax in zip(panels, axes[0], strict=True):
        peak = record["peaks"][device][dtype]
        _roof(ax, [row for row in rows if (row["device"], row["dtype"]) == (device, dtype)], peak)
        ax.set_title(f"{device}, {dtype}", fontsize=9)
    figure.suptitle(
        f"Rates on {_where(record)}, under its own copy and matrix product\n"
        "filled: the quickest of fusedres;  hollow: the quickest of the others",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _roof(ax: Axes, rows: list[dict[str, Any]], peak: dict[str, float]) -> None:
    markers = dict(zip(PASSES, "o^s", strict=True))
    intensities = []
    for row in rows:
        intensity = row["work"]["flops"] / row["work"]["bytes"]
        intensities.append(intensity)
        ours = [way for way in ("fused", "recomputed", "stacked") if way in times_of(row)]
        others = [way for way in times_of(row) if way not in ours]
        for ways, fill in ((others, "white"), (ours, COLOURS[row["family"]])):
            best = max(row["rates"][way]["tflop_per_s"] for way in ways)
            ax.plot(
                intensity, best, markers[row["pass"]], color=COLOURS[row["family"]], markerfacecolor=fill,
                markersize=4.5, markeredgewidth=0.8, linestyle="",
            )  # fmt: skip
    ridge = peak["flops_per_s"] / peak["bytes_per_s"]
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    x = [left, ridge, right]
    ax.plot(x, [min(at * peak["bytes_per_s"], peak["flops_per_s"]) / 1e12 for at in x], color="0.2", linewidth=1.2)
    ax.set_xscale("log")
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(low, max(high, peak["flops_per_s"] / 1e12 * 3))
    ax.set_xlim(left, right)
    reached = f"copy {peak['bytes_per_s'] / 1e9:.4g} GB/s\nproduct {peak['flops_per_s'] / 1e12:.3g} TFLOP/s"
    ax.annotate(reached, (0.03, 0.97), xycoords="axes fraction", fontsize=7, va="top")
    families = [family for family in FAMILIES if any(row["family"] == family for row in rows)]
    kinds = [kind for kind in PASSES if any(row["pass"] == kind for row in rows)]
    for family in families:
        ax.plot([], [], "o", color=COLOURS[family], label=FAMILIES[family], markersize=4.5)
    for kind in kinds:
        ax.plot([], [], markers[kind], color="0.4", label=PASSES[kind], markersize=4.5)
    ax.legend(fontsize=7, frameon=False, loc="lower right")
    ax.set_xlabel("flops per byte that must be moved", fontsize=8)
    ax.set_ylabel("TFLOP/s", fontsize=8)
    ax.tick_params(labelsize=7)


# ---------------------------------------------------------------------------------------------- the sweep


def sweep_picture(record: dict[str, Any], path: Path) -> None:
    """Heat maps M x width of eager's time over fused's, one for each depth and pass; blue is faster, red slower.

    A frame: slower beyond noise. Slanted: the dispatcher left the shape to eager.
    """
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
