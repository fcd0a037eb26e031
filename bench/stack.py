"""Networks of L equal layers y = x + gelu(x Wᵀ + b): FusedResidualStack against eager PyTorch and torch.compile.

    python bench/stack.py --out stack.json
    python bench/stack.py --out stack.json --device cpu --widths 16 --depths 4 --rows 64      does the script work?

Checks each answer against wider arithmetic before it times it. Times are of the device, the second-level cache flushed;
of few rows also of CUDA graphs, captured after `fusedres.warmup`. The file is written after every case; cases come by
weight, compilations are left out where the time is not there for them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from layer import MAX_LIMIT, RMS_LIMIT, errors, measured_peaks, peak_mib, wider
from stack_bytes import least
from timing import interleaved, machine
from torch import Tensor, nn

from fusedres import FusedResidualStack, warmup
from fusedres.reference import ResidualStack

WIDTHS, DEPTHS, ROWS = (64, 128, 32, 16, 256), (16, 4, 64, 1000), (65536, 4096, 256, 1, 1 << 20)
COMPILED = {"compile": "default", "compile-graphs": "reduce-overhead"}
FEW_ROWS = 4096  # up to which launches cost more than work, and graphs are tried
MOST_COMPILED = 64  # layers, beyond which a compilation takes minutes
MOST_BYTES = 24 << 30  # of kept activations


class Case(NamedTuple):
    d: int
    L: int
    M: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.d}x{self.L}, {self.M} rows, {str(self.dtype).removeprefix('torch.')}"


def cases(widths: tuple[int, ...], depths: tuple[int, ...], rows: tuple[int, ...], dtypes: list) -> Iterator[Case]:
    """Every case whose eager activations fit, those first whose place in each list is early."""
    ranked = sorted(
        product(*(enumerate(values) for values in (widths, depths, rows, dtypes))),
        key=lambda places: sum(i for i, _ in places),
    )
    for places in ranked:
        case = Case(*(value for _, value in places))
        if 4 * case.M * case.d * case.L * case.dtype.itemsize <= MOST_BYTES:
            yield case


def step(network: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = network(x)
    return y, *torch.autograd.grad(y, [x, *parameters], g)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call's launches as one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(case: Case, device: str, compiles: bool, peaks: dict[str, float], budget_s: float) -> dict[str, Any]:
    """Errors, times and rates of every way; a way that fails says why in the place of figures."""
    d, L, M, dtype = case
    torch.manual_seed(0)
    twin = ResidualStack([d] * (L + 1), branch_scale=L**-0.5, dtype=dtype, device=device)
    fused = FusedResidualStack.from_eager(twin)
    x = torch.randn(M, d, device=device).to(dtype).requires_grad_()
    g = torch.randn(M, d, device=device).to(dtype)
    result: dict[str, Any] = {}

    def answer(model: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        names, parameters = zip(*model.named_parameters(), strict=True)
        y, dx, *found = step(model, list(parameters), x, g)
        named = dict(zip(names, found, strict=True))
        named = model.by_layer(named) if isinstance(model, FusedResidualStack) else named
        kinds = ([t for name, t in named.items() if name.endswith(kind)] for kind in ("weight", "bias"))
        return y, dx, *(torch.cat([t.flatten() for t in tensors]) for tensors in kinds)

    few = x[: min(M, 256)].detach().requires_grad_()  # for the answer: float64 of a million rows takes its time
    exact = ResidualStack([d] * (L + 1), branch_scale=L**-0.5, dtype=wider(dtype), device=device)
    exact.load_state_dict(twin.state_dict())
    truth = answer(exact, few.detach().to(wider(dtype)).requires_grad_(), g[: len(few)].to(wider(dtype)))
    own, mine = (errors(answer(model, few, g[: len(few)]), truth) for model in (twin, fused))
    relative = {name: [a / max(b, 1e-30) for a, b in zip(mine[name], own[name], strict=True)] for name in mine}
    result["error_over_eager"] = relative
    if not all(largest <= MAX_LIMIT and rms <= RMS_LIMIT for largest, rms in relative.values()):
        return result | {"failure": "wrong: its error is above the limit, so it is not timed"}

    networks: dict[str, tuple[Callable, list[Tensor]]] = {"eager": (twin, list(twin.parameters()))}
    if compiles:
        torch._dynamo.reset()
        for name, mode in COMPILED.items():
            if name == "compile" or (M <= FEW_ROWS and device == "cuda"):
                networks[name] = (torch.compile(twin, mode=mode, dynamic=False), list(twin.parameters()))
    networks["fusedres"] = (fused, list(fused.parameters()))

    def forward(network: Callable) -> Tensor:
        with torch.no_grad():
            return network(x)

    for kind in ("forward", "training"):
        calls: dict[str, Callable[[], object]] = {}
        for name, (network, parameters) in networks.items():
            call = partial(forward, network) if kind == "forward" else partial(step, network, parameters, x, g)
            begin = time.perf_counter()
            try:
                call()
                calls[name] = call
            except Exception as error:
                result.setdefault(name, {})["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            result.setdefault(name, {})[f"first_{kind}_s"] = round(time.perf_counter() - begin, 2)
        if device == "cuda" and M <= FEW_ROWS:
            try:
                warmup(fused, x.shape)
                calls["fusedres-graph"] = captured(calls["fusedres"])
            except Exception as error:
                result.setdefault("fusedres-graph", {})["failure"] = f"{type(error).__name__}: {error}"[:200]
        times = interleaved(calls, device, runs=30, budget_s=budget_s)
        floor_ms = 1e3 * least(M, d, L, dtype.itemsize, kind == "training") / peaks["bytes_per_s"]
        for name, t in times.items():
            result.setdefault(name, {})[kind] = {
                **t._asdict(),
                **{f"over_{other}": times[other].median / t.median for other in ("eager", *COMPILED) if other in times},
                "share_of_floor": floor_ms / t.median,
            }
            if device == "cuda" and kind == "training" and name in ("eager", "fusedres"):
                result[name][kind]["peak_mib"] = peak_mib(calls[name])
    return result


def table(found: dict[str, dict[str, Any]]) -> str:
    """Milliseconds; how many times as fast as eager and as each compilation; the share of the floor in bytes."""
    titles = f"{'ms':>11}{'/eager':>8}{'/comp.':>8}{'/graph':>8}{'floor':>7}"
    lines = [f"{'case':<30}{'way':<16}  forward{titles}  training{titles}"]
    for case, result in found.items():
        for name, of in result.items():
            if not isinstance(of, dict) or ("forward" not in of and "failure" not in of):
                continue
            line = f"{case:<30}{name:<16}"
            for kind in ("forward", "training"):
                if kind in of:
                    t = of[kind]
                    ratios = "".join(f"{t.get(f'over_{other}', float('nan')):>8.2f}" for other in ("eager", *COMPILED))
                    line += f"         {t['median']:>11.4g}{ratios}{t['share_of_floor']:>7.1%}"
            lines.append(line + of.get("failure", "")[:60])
        if "failure" in result:
            lines.append(f"{case:<30}{result['failure']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"))
    parser.add_argument("--budget-s", type=float, default=600.0, help="no case begins later; compiling yields first")
    options = parser.parse_args()

    start = time.perf_counter()
    device = options.device
    names = options.dtypes or (["bfloat16", "float32"] if device == "cuda" else ["float32"])
    dtypes = [getattr(torch, name) for name in names]
    record: dict[str, Any] = {**machine(device), "layer": "y = x + L^-1/2 gelu(x W^T + b)", "cases": {}, "left_out": []}
    record["peaks"] = peaks = measured_peaks(dtypes[0], device)
    slowest = 0.0
    for case in cases(options.widths, options.depths, options.rows, dtypes):
        begin = time.perf_counter()
        left = options.budget_s - (begin - start)
        if left < 2:
            record["left_out"].append(str(case))
            continue
        compiles = case.L <= MOST_COMPILED and left > 1.5 * slowest * case.L / 16 + 20
        try:
            found = measure(case, device, compiles, peaks, 1.5)
        except torch.OutOfMemoryError as error:
            found = {"failure": f"OutOfMemoryError: {' '.join(str(error).split())[:120]}"}
        record["cases"][str(case)] = found
        if compiles:
            slowest = max(slowest, (time.perf_counter() - begin) * 16 / case.L)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{case}: {time.perf_counter() - begin:.0f} s, {time.perf_counter() - start:.0f} in all", flush=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print({name: f"{value:.3g}" for name, value in peaks.items()})
    print(table(record["cases"]))
    print(f"{len(record['left_out'])} cases left out for their time")


if __name__ == "__main__":
    main()
