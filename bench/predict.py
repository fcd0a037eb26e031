"""Microseconds of every target on an H100, predicted, not measured, for the first run to confirm or refute.

    python bench/predict.py                          the table, by the instructions that its file has counted
    python bench/predict.py --write                  counts again, compiling for sm_90; writes file and table
    python bench/predict.py --against layer.json     beside medians of `pytest bench/ --benchmark -k "cuda and layer"`

bench/prediction.py has the assumptions; a pass takes the sum of its kernels. The file is
bench/results/predictions.json, the table stands in kernels/README.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layer_bytes import PROGRAMS, WIDTHS, Kernel, Size, backward, forward, layer_facts, least
from prediction import ASSUMED, OPPONENTS, Count, M, compiled, configuration, eager, key, product, times
from report import columns, times_of

from fusedres import plans
from fusedres.kernels.config import Plan, Together

ROOT = Path(__file__).resolve().parent.parent
FILE, README = ROOT / "bench/results/predictions.json", ROOT / "kernels/README.md"
BEGIN, END = "<!-- written by python bench/predict.py --write -->", "<!-- written until here -->"
WHAT = "predicted, not measured"

TARGETS: dict[int, tuple[float, float, float | None]] = {  # at least, of compile: forward, training; at most, of matmul
    64: (1.6, 2.2, None),
    128: (1.6, 2.2, None),
    256: (1.6, 1.5, None),
    512: (1.6, 1.4, None),
    1024: (1.45, 1.3, 1.15),
    2048: (1.2, 1.15, 1.10),
    4096: (1.05, 1.0, 1.05),
    8192: (1.05, 1.0, 1.05),
}
NOT_SLOWER = 0.98  # than eager
MATMUL, MISSED_BY_OVERLAP = "fused / matmul", "missed, unless finishing overlaps"


# ---------------------------------------------------------------------------------------------- predictions


def ours(d: int, kind: str) -> tuple[Plan, bool, list[Kernel]]:
    """The plan, whether forward keeps, and the launches of a pass."""
    plan, size = plans.plan_of(layer_facts(d)), Size(M, d, d, 2)
    if kind == "F":
        return plan, False, forward(plan.forward, size, False, PROGRAMS)
    keeps = not isinstance(plan.backward, Together)
    return plan, keeps, forward(plan.training, size, keeps, PROGRAMS) + backward(plan, size, PROGRAMS)


def prediction(d: int, kind: str, counts: dict[str, Count]) -> dict[str, Any]:
    """A row: microseconds of everybody, and each target with its ratio, verdict and margin."""
    plan, keeps, kernels = ours(d, kind)
    size, trains = Size(M, d, d, 2), kind == "FB"
    mine = times(kernels, plan, keeps, d, counts)
    fused, overlapped = sum(t.us for t in mine), sum(t.overlapped for t in mine)
    others = {"compile": compiled(size, trains), "eager": eager(size, trains)}
    if not trains:
        others["matmul"] = [product(size)]
    us = {name: sum(t.us for t in times(of, None, False, d, {})) for name, of in others.items()}
    F, FB, over_matmul = TARGETS[d]
    targets = [
        target("compile / fused", FB if trains else F, us["compile"] / fused, us["compile"] / overlapped),
        target("eager / fused", NOT_SLOWER, us["eager"] / fused, us["eager"] / overlapped),
    ]
    if over_matmul and not trains:
        targets.append(target(MATMUL, over_matmul, fused / us["matmul"], overlapped / us["matmul"]))
    return {
        "d": d,
        "pass": kind,
        "what": WHAT,
        "predicted_us": {"fused": _rounded(fused), "overlapped": _rounded(overlapped)}
        | {name: _rounded(t) for name, t in us.items()},
        "kernels_us": {t.name: _rounded(t.us) for t in mine},
        "passes": _rounded(sum(k.moved for k in kernels) / size.x),
        "passes_from_cache": _rounded(sum(k.cached for k in kernels) / size.x),
        "floor_passes": _rounded(least(size, trains) / size.x),
        "targets": targets,
    }


def target(name: str, bar: float, ratio: float, overlapped: float) -> dict[str, Any]:
    """margin: how much longer fused may take, as a share; below 0 it is to be shorter."""
    margin = bar / ratio - 1 if name == MATMUL else ratio / bar - 1
    verdict = "met" if is_met(name, bar, ratio) else MISSED_BY_OVERLAP if is_met(name, bar, overlapped) else "missed"
    numbers = {"bar": bar, "predicted": ratio, "overlapped": overlapped, "margin": margin}
    return {"ratio": name, **{key: _rounded(n) for key, n in numbers.items()}, "verdict": verdict}


def is_met(name: str, bar: float, ratio: float) -> bool:
    """The time over matmul's is at most the bar, the others' over ours at least."""
    return ratio <= bar if name == MATMUL else ratio >= bar


def aim(t: dict[str, Any]) -> str:
    return f"{t['ratio']} {'≤' if t['ratio'] == MATMUL else '≥'} {t['bar']:.3g}"


def _us(number: float) -> str:
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


def row_name(d: int, kind: str) -> str:
    """As the contest's results call it."""
    return f"cuda-layer-d{d}-m{M}-bf16-{kind}"


def predictions(counts: dict[str, Count]) -> dict[str, dict[str, Any]]:
    return {row_name(d, kind): prediction(d, kind, counts) for d in WIDTHS for kind in ("F", "FB")}


# ---------------------------------------------------------------------------------------------- counting, writing


def counted() -> dict[str, Count]:
    """Every kernel of the plans, compiled for sm_90."""
    import issued
    from configurations import Configuration, FormConfiguration

    found: dict[str, Count] = {}
    for d in WIDTHS:
        for kind in ("F", "FB"):
            plan, keeps, kernels = ours(d, kind)
            for kernel in kernels:
                if kernel.issues is None or (name := key(kernel, plan, keeps, d)) in found:
                    continue
                of, is_keeping, tile = configuration(kernel, plan, keeps, d)
                width = min(d, 1024)
                found[name] = Count(
                    *issued.issued(
                        Configuration("dz", "bf16", False, False, tile)
                        if of == "dz"
                        else FormConfiguration(of, "bf16", width, width, is_keeping, tile)
                    )
                )
    return found


def read_counts(record: dict[str, Any]) -> dict[str, Count]:
    return {name: Count(**count) for name, count in record["instructions"].items()}


def record(counts: dict[str, Count]) -> dict[str, Any]:
    """What the file says, but for who wrote it when."""
    return {
        "kind": "predictions",
        "what": WHAT,
        "assumed": {name: {"value": number, "because": why} for name, (number, why) in ASSUMED.items()},
        "opponents": OPPONENTS,
        "instructions": {name: count._asdict() for name, count in counts.items()},
        "rows": predictions(counts),
    }


def write() -> None:
    import triton
    from timing import host

    found = record(counted())
    head = {name: found.pop(name) for name in ("kind", "what")}
    facts = {
        **{name: fact for name, fact in host().items() if name in ("commit", "date")},
        "triton": triton.__version__,
    }
    FILE.write_text(json.dumps({**head, **facts, **found}, indent=1, ensure_ascii=False) + "\n")
    README.write_text(replaced(README.read_text(), found["rows"]))


def replaced(text: str, rows: dict[str, dict[str, Any]]) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{README} must have one line {BEGIN} and one {END}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{markdown(rows)}\n{END}{rest.partition(END)[2]}"


# ---------------------------------------------------------------------------------------------- tables

TITLES = ("d", "pass", "passes", "at least", "fused µs", "compile µs", "eager µs", "matmul µs", "target", "predicted",
          "overlapped", "margin", "verdict")  # fmt: skip


def cells(row: dict[str, Any]) -> list[list[str]]:
    """A line for each target; the first has the microseconds."""
    us = row["predicted_us"]
    facts = [str(row["d"]), {"F": "forward", "FB": "training"}[row["pass"]]]
    facts += [f"{row[name]:.3g}" for name in ("passes", "floor_passes")]
    facts += [_us(us[way]) if way in us else "" for way in ("fused", "compile", "eager", "matmul")]
    lines = []
    for t in row["targets"]:
        if t["ratio"] == "eager / fused" and t["verdict"] == "met":
            continue  # everywhere, and said below
        numbers = [_two(t["predicted"]), _two(t["overlapped"]), f"{t['margin']:+.0%}"]
        lines.append([*facts, aim(t), *numbers, t["verdict"]])
        facts = ["", "", "", "", "", "", "", ""]
    return lines


def said_of_eager(rows: dict[str, dict[str, Any]]) -> str:
    missed = [name for name, row in rows.items() for t in row["targets"] if t["ratio"] == "eager / fused"
              and t["verdict"] != "met"]  # fmt: skip
    return f"Slower than eager by more than 2 %, as predicted: {', '.join(missed) or 'none'}."


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    lines = [list(TITLES), ["---"] * len(TITLES), *(line for row in rows.values() for line in cells(row))]
    table = "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)
    return f"{table}\n\n{said_of_eager(rows)}"


def text(rows: dict[str, dict[str, Any]]) -> str:
    found = columns(TITLES, [line for row in rows.values() for line in cells(row)])
    return f"Predicted, not measured: M = {M}, bf16, H100.\n{found}\n{said_of_eager(rows)}"


def against(rows: dict[str, dict[str, Any]], measured: dict[str, Any]) -> str:
    """Measured medians beside predictions, line by line; a row or a way that was not measured has none."""
    if measured.get("kind") != "contest":
        raise ValueError(f"measured results must be of kind contest, got {measured.get('kind')}")
    lines = []
    for name, row in rows.items():
        found = measured["rows"].get(name)
        us = {} if found is None else {way: 1e3 * t["median"] for way, t in times_of(found).items()}
        of_compile = [us[way] for way in ("compile", "compile-autotuned") if way in us]
        us |= {"compile": min(of_compile)} if of_compile else {}
        for way, predicted in row["predicted_us"].items():
            if way != "overlapped":
                lines.append([name, f"{way} µs", _us(predicted), *_measured(us.get(way), predicted, _us), ""])
        for t in row["targets"]:
            upper, lower = t["ratio"].split(" / ")
            ratio = us[upper] / us[lower] if upper in us and lower in us else None
            said = f"predicted {t['verdict']}"
            if ratio is not None:
                said += f", measured {'met' if is_met(t['ratio'], t['bar'], ratio) else 'missed'}"
            lines.append([name, aim(t), _two(t["predicted"]), *_measured(ratio, t["predicted"], _two), said])
    return columns(("row", "what", "predicted", "measured", "measured/predicted", ""), lines)


def _measured(found: float | None, predicted: float, say: Callable[[float], str]) -> list[str]:
    return ["-", "-"] if found is None else [say(found), _two(found / predicted)]


def _two(number: float) -> str:
    return f"{number:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", action="store_true", help=f"count again, and write {FILE.name} and kernels/README.md"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions here, too")
    parser.add_argument("--against", type=Path, metavar="FILE.json", help="measured, beside the predictions")
    options = parser.parse_args()
    if options.write:
        write()
    found = record(read_counts(json.loads(FILE.read_text())))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if options.against:
        print(against(found["rows"], json.loads(options.against.read_text())))
    else:
        print(text(found["rows"]))


if __name__ == "__main__":
    main()
