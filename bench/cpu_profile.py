"""Where the time of a row's fused network goes: the call, the products, and what is left, the elementwise part.

    python bench/cpu_profile.py c1024 --pass FB [--budget SECONDS] [--json FILE]
    python bench/cpu_profile.py --missed bench/results/cpu.json      every row that misses its bar there

call          the same network on one row, from Python to the last gradient: mostly what does not depend on the batch
loss          what the mean squared error and its gradient, which everybody pays, take beyond one row's
products      the same products alone, each the faster of torch.mm (MKL or BLAS) and oneDNN's linear
elementwise   the rest: activation, slope, skip, bias and its gradient, and passes over memory; below 0, when our
              products run faster than either library's call

Of a row of one, call and products are the whole call: it is not split, and products are given beside it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import opponents
import torch
import torch.nn.functional as F
from cases import Row
from opponents import Contender
from timing import host, in_turns
from torch import Tensor


def products(row: Row, kind: str) -> Counter[tuple[str, int, int, int]]:
    """{(what, rows, columns, depth): how often}: z = x Wᵀ, then dW = dzᵀ x, and dx = dz W but for the first layer."""
    found: Counter[tuple[str, int, int, int]] = Counter()
    for i, (K, N) in enumerate(row.layers):
        found["z", row.M, N, K] += 1
        if kind == "FB":
            found["dW", N, K, row.M] += 1
            if i > 0:
                found["dx", row.M, K, N] += 1
    return found


def product_calls(what: str, m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The ways of torch to compute a product [m, k] [k, n], with operands laid out as `what` finds them."""
    if what == "z":
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype).t()
    elif what == "dx":
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    else:
        a, b = torch.randn(k, m, dtype=dtype).t(), torch.randn(k, n, dtype=dtype)
    out = torch.empty(m, n, dtype=dtype)
    calls: dict[str, Callable[[], object]] = {"torch.mm": lambda: torch.mm(a, b, out=out)}
    if torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise

        def by_onednn() -> Tensor:
            return linear(a, b.t(), None, "none", [], "")

        try:
            by_onednn()
        except RuntimeError:  # a layout or type that this oneDNN does not take
            return calls
        calls["oneDNN"] = by_onednn
    return calls


def profile(row: Row, kind: str, way: str, budget_s: float) -> dict[str, Any]:
    """Milliseconds of the row and of its parts, each the median of its own rounds."""
    with torch.set_grad_enabled(kind == "FB"):
        contender = _contender(row, way)
        x, target = opponents.draw(row)[1:]
        calls = {"all": contender.call(kind, x, target), "call": contender.call(kind, x[:1], target[:1])}
        if kind == "FB":
            calls |= {"loss": _loss(target), "loss of one row": _loss(target[:1])}
        times = in_turns(calls, budget_s / 2)
    shapes = products(row, kind)
    rates: list[dict[str, Any]] = []
    with torch.no_grad():
        for (what, m, n, k), count in shapes.items():
            found = in_turns(product_calls(what, m, n, k, row.dtype), budget_s / 2 / len(shapes))
            by = min(found, key=lambda name: found[name].median)
            ms = found[by].median
            rate = {"gflop_per_s": 2e-6 * m * n * k / ms, "by": by}
            rates.append({"product": what, "m": m, "n": n, "k": k, "count": count, "ms": count * ms, **rate})
    parts = {"call": times["call"].median}
    if kind == "FB":
        parts["loss"] = times["loss"].median - times["loss of one row"].median
    parts["products"] = sum(rate["ms"] for rate in rates)
    if row.M > 1:
        parts["elementwise"] = times["all"].median - sum(parts.values())
    return {"row": row.name, "pass": kind, "way": way, "all": times["all"]._asdict(), "parts": parts, "products": rates}


def _loss(target: Tensor) -> Callable[[], None]:
    y = torch.zeros_like(target, requires_grad=True)

    def call() -> None:
        y.grad = None
        F.mse_loss(y, target).backward()

    return call


def _contender(row: Row, way: str) -> Contender:
    module = opponents.draw(row)[0]
    return opponents.of_module(module) if way == "eager" else getattr(opponents, way)(module, row)


def report(found: dict[str, Any]) -> None:
    whole = found["all"]["median"]
    print(f"{found['row']} {found['pass']}, {found['way']}: {whole:.4g} ms")
    for name, ms in found["parts"].items():
        print(f"    {name:<12}{ms:10.4g} ms{ms / whole:7.0%}")
    print("products alone:")
    for rate in found["products"]:
        shape = f"[{rate['m']}, {rate['k']}] [{rate['k']}, {rate['n']}]"
        print(
            f"    {rate['count']:>4} {rate['product']:<3}{shape:<30}{rate['ms']:10.4g} ms"
            f"{rate['gflop_per_s']:8.1f} GF/s  {rate['by']}"
        )


def missed(path: Path) -> list[tuple[Row, str]]:
    """(row, pass) of those in a contest's results that miss their bar."""
    found = json.loads(path.read_text())["rows"].values()
    return [(cases.named(row["row"]), row["pass"]) for row in found if row["is_met"] is False]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=[row.name for row in cases.ROWS], metavar="ROW", nargs="?")
    parser.add_argument("--missed", type=Path, metavar="FILE", help="in the place of ROW and --pass")
    parser.add_argument("--pass", dest="kind", choices=("F", "FB"), default="FB")
    parser.add_argument("--way", choices=("eager", "fused", "stacked"), default="fused")
    parser.add_argument("--rows", type=int, metavar="M", help="of x, in the place of the row's own")
    parser.add_argument("--budget", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if (options.row is None) == (options.missed is None):
        parser.error("either ROW or --missed FILE expected")

    wanted = missed(options.missed) if options.missed else [(cases.named(options.row), options.kind)]
    profiles = {}
    for row, kind in wanted:
        if options.rows:
            row = row.shrunk(options.rows)
        if options.way == "stacked" and not row.can_stack:
            parser.error(f"--way stacked expected a row with equal layers to stack, got {row}")
        profiles[f"{row}-{kind}"] = found = profile(row, kind, options.way, options.budget)
        report(found)
        if options.json:
            options.json.write_text(json.dumps({"kind": "profile", **host(), "rows": profiles}, indent=1) + "\n")


if __name__ == "__main__":
    main()
