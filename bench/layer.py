"""y = x + gelu(x Wᵀ + b), forward and training step: fusedres against eager PyTorch and torch.compile.

    python bench/layer.py --out layer.json
    python bench/layer.py --out layer.json --device cpu --rows 256 --widths 16 32      does the script work?

Checks each answer against wider arithmetic before it times it. Writes the file after every width.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import interleaved, machine
from torch import Tensor

from fusedres import dispatch
from fusedres.functional import residual_linear

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]

# In units of eager's own error: roundings in another order stay below these, a lost term does not.
RMS_LIMIT = 2.0
MAX_LIMIT = 8.0
COMPILED = {"compile": "default", "compile-autotuned": "max-autotune-no-cudagraphs"}


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x + F.gelu(F.linear(x, weight, bias))


def step(layer: Layer, operands: tuple[Tensor, ...], g: Tensor) -> tuple[Tensor, ...]:
    """A training step's work: the output, then the gradients of x, weight and bias."""
    y = layer(*operands)
    return y, *torch.autograd.grad(y, operands, g)


def ways(includes_autotuned: bool) -> dict[str, Layer]:
    """The competing layers; compilations are cold, so that no width inherits another's."""
    torch._dynamo.reset()
    compiled = {
        name: torch.compile(eager, mode=mode, dynamic=False)
        for name, mode in COMPILED.items()
        if includes_autotuned or name != "compile-autotuned"
    }
    fused = {
        "fusedres": partial(residual_linear, skip="identity"),
        "fusedres-recompute": partial(residual_linear, skip="identity", recompute=True),
    }
    return {"eager": eager, **compiled, **fused}


def draw(M: int, d: int, dtype: torch.dtype, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """(x, weight, bias) that ask for gradients, and g, the gradient of y."""
    x, weight, bias, g = (torch.randn(shape, device=device) for shape in ((M, d), (d, d), (d,), (M, d)))
    operands = tuple(t.to(dtype).requires_grad_() for t in (x, weight * d**-0.5, bias))
    return operands, g.to(dtype)


# ---------------------------------------------------------------------------------------------- one width


def measure(M: int, d: int, dtype: torch.dtype, device: str, with_autotuned: bool, peaks: dict[str, float]) -> dict:
    """Errors, times and rates of every way at one width; a way that fails says why in the place of figures."""
    torch.manual_seed(0)
    operands, g = draw(M, d, dtype, device)
    result: dict[str, Any] = {name: {} for name in ("eager", *COMPILED, "fusedres", "fusedres-recompute")}
    if not with_autotuned:
        result["compile-autotuned"] = {"failure": "left out: no time left"}

    truth = step(eager, tuple(t.detach().to(wider(dtype)).requires_grad_() for t in operands), g.to(wider(dtype)))
    own = errors(step(eager, operands, g), truth)
    running: dict[str, Layer] = {}
    for name, layer in ways(with_autotuned).items():
        begin = time.perf_counter()
        try:
            with torch.no_grad():
                layer(*operands)
            found = errors(step(layer, operands, g), truth)
        except Exception as error:
            result[name]["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        result[name]["first_call_s"] = round(time.perf_counter() - begin, 2)
        result[name]["error_over_eager"] = relative = {
            tensor: [mine / max(theirs, 1e-30) for mine, theirs in zip(found[tensor], own[tensor], strict=True)]
            for tensor in found
        }
        if all(largest <= MAX_LIMIT and rms <= RMS_LIMIT for largest, rms in relative.values()):
            running[name] = layer
        else:
            result[name]["failure"] = "wrong: its error is above the limit, so it is not timed"
    del truth

    def forward(layer: Layer) -> Tensor:
        with torch.no_grad():
            return layer(*operands)

    kinds: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {name: partial(forward, layer) for name, layer in running.items()},
        "training": {name: partial(step, layer, operands, g) for name, layer in running.items()},
    }
    for kind, functions in kinds.items():
        times = interleaved(functions, device, budget_s=6)
        best = min((t.median for name, t in times.items() if name in COMPILED), default=None)
        for name, t in times.items():
            result[name][kind] = {
                **t._asdict(),
                "over_eager": times["eager"].median / t.median,
                "over_best_compile": None if best is None else best / t.median,
                **_rates(kind, M, d, dtype, t.median, peaks),
            }
            if device == "cuda" and kind == "training":
                result[name][kind]["peak_mib"] = peak_mib(functions[name])
    return result


def wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def errors(got: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, tuple[float, float]]:
    """The largest and the root mean square error of y and of each gradient."""
    found = {}
    for name, mine, theirs in zip(("y", "x", "weight", "bias"), got, truth, strict=True):
        difference = (mine.detach() - theirs.detach()).abs_()
        found[name] = (float(difference.max()), float(difference.square_().mean().sqrt()))
    return found


def _rates(kind: str, M: int, d: int, dtype: torch.dtype, ms: float, peaks: dict[str, float]) -> dict[str, float]:
    """Useful work per time, and the share of the roofline: the least time in which this chip could do it.

    Forward reads x and writes y; training also reads x and g again, and writes dx. Weights pass once each way.
    """
    passes, products, weights = (2, 1, 1) if kind == "forward" else (5, 3, 3)
    bytes_moved = (passes * M * d + weights * d * d) * dtype.itemsize
    flops = 2 * products * M * d * d
    floor_ms = 1e3 * max(bytes_moved / peaks["bytes_per_s"], flops / peaks["flops_per_s"])
    return {
        "gb_per_s": bytes_moved / ms / 1e6,
        "tflop_per_s": flops / ms / 1e9,
        "share_of_roofline": floor_ms / ms,
    }


def peak_mib(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measured_peaks(dtype: torch.dtype, device: str) -> dict[str, float]:
    """This machine's own ceilings: a large copy, bytes read plus bytes written, and a large matrix product."""
    size, n = (2**29, 8192) if device == "cuda" else (2**25, 512)
    source = torch.randint(-100, 100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = interleaved({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device, runs=20, budget_s=5)
    return {
        "bytes_per_s": 2e3 * size / times["copy"].median,
        "flops_per_s": 2e3 * n**3 / times["product"].median,
    }


# ---------------------------------------------------------------------------------------------- all widths


def table(widths: dict[str, dict[str, Any]]) -> str:
    """Milliseconds; how many times as fast as the better compilation; the share of the roofline."""
    columns = "".join(f"{title:>12}{'/compile':>9}{'roof':>6}" for title in ("forward ms", "training ms"))
    lines = [f"{'width':>6} {'way':<19}{columns}"]
    for d, result in widths.items():
        for name, found in result.items():
            line = f"{d:>6} {name:<19}"
            if "failure" in found:
                lines.append(line + found["failure"][:60])
                continue
            for t in (found["forward"], found["training"]):
                ratio = "" if t["over_best_compile"] is None else f"{t['over_best_compile']:.2f}"
                line += f"{t['median']:>12.4g}{ratio:>9}{t['share_of_roofline']:>6.0%}"
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on a CPU float32"
    )
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--budget-s", type=float, default=240.0, help="no width begins later; autotuning yields first")
    options = parser.parse_args()

    start = time.perf_counter()
    device, dtype = (
        options.device,
        getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32")),
    )
    choice = dispatch.choose(torch.device(device), dtype, is_empty=False)
    print(f"fusedres: {type(choice).__name__}, because {choice.because}", flush=True)
    record: dict[str, Any] = {
        **machine(device),
        "fusedres": f"{type(choice).__name__}: {choice.because}",
        "layer": "y = x + gelu(x W^T + b)",
        "rows": options.rows,
        "dtype": str(dtype),
        "peaks": measured_peaks(dtype, device),
        "widths": {},
    }
    slowest = 0.0
    for i, d in enumerate(options.widths):
        begin = time.perf_counter()
        left = options.budget_s - (begin - start)
        if left < 0:
            record["left_out"] = options.widths[i:]
            break
        with_autotuned = left > 1.5 * slowest + 15
        record["widths"][str(d)] = measure(options.rows, d, dtype, device, with_autotuned, record["peaks"])
        slowest = max(slowest, time.perf_counter() - begin)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"width {d}: {time.perf_counter() - begin:.0f} s, {time.perf_counter() - start:.0f} s in all", flush=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print({name: f"{value:.3g}" for name, value in record["peaks"].items()})
    print(table(record["widths"]))


if __name__ == "__main__":
    main()
