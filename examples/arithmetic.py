"""What training on many GPUs moves and waits for, by arithmetic: nothing here is measured.

python examples/arithmetic.py            prints the tables of docs/distributed.md
python examples/arithmetic.py --write    writes them there
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from math import ceil, log2
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "distributed.md"

# Assumed, of one H100 SXM and of a node of 8 (NVIDIA's data sheets of the H100 and of the DGX H100)
PEAK = 989e12  # bfloat16 products per second, dense, in flops
MEMORY = 80e9  # bytes
NVLINK = 450e9  # bytes per second and GPU, each way
NIC = 50e9  # bytes per second and GPU, each way: one 400 Gb/s InfiniBand adapter each
NODE = 8  # GPUs

# Assumed without a source: what of these is reached, and what an exchange costs before its first byte
REACHED, LINKED, LATENCY = 0.5, 0.8, 10e-6

# The network: L layers [d, d] in bfloat16, gradients reduced in float32, Adam
WIDTH, LAYERS, ROWS = 4096, 64, 4096
WEIGHT, GRADIENT, STATE = 2, 4, 12  # bytes per parameter; STATE: a float32 copy and Adam's two averages

FLOPS = PEAK * REACHED
COUNTS = (8, 64, 256, 1024)


def parameters(d: int = WIDTH, layers: int = LAYERS) -> int:
    return layers * (d * d + d)


def link(n: int) -> float:
    """Bytes per second and GPU of an exchange among n: NVLink in a node, beyond it a node's eight adapters together."""
    return LINKED * (NVLINK if n <= NODE else min(NVLINK, NODE * NIC))


def ring(n: int) -> float:
    """(n - 1) / n: what a GPU sends of a buffer that is gathered, or reduced and scattered; an all-reduce is both."""
    return (n - 1) / n


def waits(n: int) -> float:
    return 2 * ceil(log2(n)) * LATENCY if n > 1 else 0.0


def products(rows: int, count: float, times: int) -> float:
    """Seconds for so many passes over `count` parameters: one forward, two backward."""
    return 2 * times * rows * count / FLOPS


# ---------------------------------------------------------------------------------------------- the forms


def ddp(n: int, rows: int, layers: int = LAYERS) -> tuple[float, float, float]:
    """(bytes that a GPU sends in a step, seconds of it, seconds of the step): reduced while backward computes."""
    count = parameters(layers=layers)
    sent = 2 * ring(n) * GRADIENT * count
    exchange = sent / link(n) + waits(n)
    last = exchange / layers  # the first layer's, which nothing is left to hide
    return sent, exchange, products(rows, count, 1) + max(products(rows, count, 2), exchange - last) + last


def ddp_rows(n: int) -> float:
    """The rows per GPU above which backward hides the reduction: 2 (n-1)/n g P / B = 4 M P / F."""
    return 2 * ring(n) * GRADIENT * FLOPS / (4 * link(n))


def fsdp(n: int, rows: int) -> tuple[float, float, float]:
    """The same: gathered forward, gathered again backward, gradients reduced and scattered; all but the first layer's
    gathering and the last one's scattering while others compute."""
    count = parameters()
    gather, scatter = (ring(n) * size * count / link(n) + LAYERS * waits(n) / 2 for size in (WEIGHT, GRADIENT))
    sent = ring(n) * (2 * WEIGHT + GRADIENT) * count
    forward = max(products(rows, count, 1), gather)
    backward = max(products(rows, count, 2), gather + scatter)
    return sent, 2 * gather + scatter, forward + backward + (gather + scatter) / LAYERS


def fsdp_rows(n: int) -> float:
    """Above which both directions hide their exchanges: p P / B = 2 M P / F, and (p + g) P / B = 4 M P / F."""
    return ring(n) * FLOPS / link(n) * max(WEIGHT / 2, (WEIGHT + GRADIENT) / 4)


def state_bytes(n: int) -> float:
    """Of a GPU whose parameters, gradients and optimiser's state are divided among n, two layers gathered."""
    return parameters() * (STATE + GRADIENT) / n + 2 * WEIGHT * parameters(layers=1)


def tensor_parallel(t: int, rows: int, d: int = WIDTH) -> tuple[float, float, float]:
    """(bytes, seconds of exchanges, seconds of a step) of a block d -> 4 d -> d: one sum of [rows, d] each way."""
    sent = 2 * 2 * ring(t) * WEIGHT * rows * d
    exchange = sent / link(t) + 2 * waits(t)
    return sent, exchange, products(rows, 8 * d * d / t, 3) + exchange


def tensor_width(t: int, share: float) -> float:
    """The width from which exchanges take at most this share of the step's products."""
    return ring(t) * t * WEIGHT * FLOPS / (12 * share * link(t))


def pipeline(p: int, micro: int, rows: int) -> tuple[float, float, float]:
    """(bytes that a stage sends in a step, seconds per micro-batch of it, share of the step that it computes)."""
    part = rows / micro
    sent = 2 * WEIGHT * rows * WIDTH
    hop = WEIGHT * part * WIDTH / (LINKED * NIC) + LATENCY
    return sent, hop, micro / (micro + p - 1)


# ---------------------------------------------------------------------------------------------- tables


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(heads), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if value >= 100 else f"{value:.3g}"


def giga(size: float) -> str:
    return f"{number(size / 1e9)} GB"


def milli(seconds: float) -> str:
    return f"{number(1e3 * seconds)} ms"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def assumed() -> str:
    figures = [
        ("bfloat16 products, dense", f"{PEAK / 1e12:.0f} TFLOP/s", "NVIDIA H100 data sheet, SXM"),
        ("memory", giga(MEMORY), "same"),
        ("NVLink, each way", f"{giga(NVLINK)}/s per GPU", "same: 900 GB/s both ways together"),
        (
            "InfiniBand, each way",
            f"{giga(NIC)}/s per GPU",
            "NVIDIA DGX H100 data sheet: 400 Gb/s per adapter, one per GPU",
        ),
        ("a node", f"{NODE} GPUs", "same"),
        ("of the products reached", percent(REACHED), "a guess"),
        ("of the links reached", percent(LINKED), "a guess"),
        ("before an exchange's first byte", f"{number(1e6 * LATENCY)} µs and hop, 2 ⌈log₂ n⌉ hops", "a guess"),
    ]
    network = [
        ("network", f"{LAYERS} layers of width {WIDTH}, {parameters() / 1e9:.2f} · 10⁹ parameters", "chosen"),
        (
            "parameters, gradients, optimiser",
            f"{WEIGHT}, {GRADIENT}, {STATE} bytes each",
            "bfloat16; float32; a float32 copy and Adam's two averages",
        ),
    ]
    return table(["what", "figure", "from"], figures + network)


def data_table() -> str:
    def row(n: int) -> list[object]:
        sent, exchange, step = ddp(n, ROWS)
        alone = products(ROWS, parameters(), 3)
        few = products(ROWS // 4, parameters(), 3) / ddp(n, ROWS // 4)[2]
        return [n, giga(sent), milli(exchange), milli(step), percent(alone / step), percent(few), number(ddp_rows(n))]

    heads = ["GPUs", "a GPU sends", "exchange", "step", f"computes, {ROWS} rows per GPU", f"computes, {ROWS // 4}"]
    return table([*heads, "rows per GPU that hide it"], map(row, COUNTS))


def sharded_table() -> str:
    def row(n: int) -> list[object]:
        sent, exchange, step = fsdp(n, ROWS)
        alone = products(ROWS, parameters(), 3)
        few = products(ROWS // 4, parameters(), 3) / fsdp(n, ROWS // 4)[2]
        held = giga(state_bytes(n))
        return [
            n,
            giga(sent),
            milli(exchange),
            milli(step),
            percent(alone / step),
            percent(few),
            number(fsdp_rows(n)),
            held,
        ]

    heads = ["GPUs", "a GPU sends", "exchanges", "step", f"computes, {ROWS} rows per GPU", f"computes, {ROWS // 4}"]
    return table([*heads, "rows per GPU that hide them", "a GPU holds"], map(row, COUNTS))


def tensor_table() -> str:
    def row(t: int) -> list[object]:
        sent, exchange, step = tensor_parallel(t, ROWS)
        small = tensor_parallel(t, ROWS, WIDTH // 4)
        shares = [percent(1 - one[1] / one[2]) for one in (small, (sent, exchange, step))]
        return [t, giga(sent), milli(exchange), milli(step - exchange), *shares, number(tensor_width(t, 0.25))]

    heads = ["GPUs", "a GPU sends per block", "exchanges", "products", f"computes, width {WIDTH // 4}"]
    return table([*heads, f"width {WIDTH}", "width for a quarter's wait"], map(row, (2, 4, 8, 16, 64)))


def pipeline_table() -> str:
    def row(p: int) -> list[object]:
        shares = [percent(pipeline(p, micro, ROWS * p)[2]) for micro in (p, 4 * p, 16 * p)]
        sent, hop, _ = pipeline(p, 4 * p, ROWS * p)
        part = products(ROWS // 4, parameters(layers=LAYERS // p), 3)
        return [p, LAYERS // p, giga(sent), milli(hop), milli(part), *shares]

    heads = ["stages", "layers each", "a stage sends", "a hop", "a micro-batch's products"]
    return table([*heads, "computes, p micro-batches", "4 p", "16 p"], map(row, (2, 4, 8, 16)))


def limits() -> str:
    """One batch, shared among ever more GPUs: where the rows of each no longer hide its exchanges."""
    batch = 2**20

    def row(n: int) -> list[object]:
        rows = batch // n
        alone, inputs = products(rows, parameters(), 3), WEIGHT * rows * WIDTH * LAYERS
        cells: list[object] = [n, rows, giga(inputs)]
        for form, state in ((ddp, parameters() * (WEIGHT + GRADIENT + STATE)), (fsdp, state_bytes(n))):
            step = form(n, rows)[2]
            fits = "" if inputs + state <= MEMORY else ", does not fit"
            cells.append(f"{milli(step)}, {percent(alone / step)}{fits}")
        return cells

    heads = ["GPUs", "rows per GPU", "layers' inputs", "DDP: step, computes", "FSDP2: step, computes"]
    return table(heads, map(row, COUNTS))


def together() -> str:
    """All at once: tensor parallel in a node, stages over nodes, data parallel over the rest."""

    def row(n: int, t: int, p: int) -> list[object]:
        copies = n // (t * p)
        held = parameters() * (WEIGHT + GRADIENT + STATE) / (t * p)
        sent = 2 * ring(copies) * GRADIENT * parameters() / (t * p) if copies > 1 else 0.0
        bubble = pipeline(p, 4 * p, ROWS * p)[2]
        waiting = tensor_parallel(t, ROWS) if t > 1 else (0.0, 0.0, 1.0)
        return [f"{copies} × {p} × {t}", n, giga(held), giga(sent), percent(bubble * (1 - waiting[1] / waiting[2]))]

    chosen = [(8, 8, 1), (64, 8, 1), (64, 8, 8), (1024, 1, 1), (1024, 8, 1), (1024, 8, 8), (1024, 8, 16)]
    heads = ["copies × stages × tensor parallel", "GPUs", "a GPU holds", "a GPU sends for its copy's gradients"]
    return table([*heads, "computes, before that exchange"], (row(*one) for one in chosen))


SECTIONS: dict[str, Callable[[], str]] = {
    "assumed": assumed,
    "ddp": data_table,
    "fsdp": sharded_table,
    "limits": limits,
    "tensor": tensor_table,
    "pipeline": pipeline_table,
    "together": together,
}
_PLACE = "<!-- written by python examples/arithmetic.py: {} -->\n{}<!-- written until here -->"


def written(page: str) -> str:
    """The page with the tables as they are now."""
    for name, section in SECTIONS.items():
        place = re.compile(re.escape(_PLACE).replace(r"\{\}", name, 1).replace(r"\{\}", "(?:[^<]*\n)?", 1))
        if not place.search(page):
            raise ValueError(f"{PAGE.name} has no place for {name}")
        page = place.sub(lambda _: _PLACE.format(name, section() + "\n"), page)  # noqa: B023 : called at once
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write the tables to {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(written(PAGE.read_text()))
        return 0
    for name, section in SECTIONS.items():
        print(f"{name}\n\n{section()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
