"""README.md's table of what was measured, written from the committed files of results: every figure is a file's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cases import named
from sweep import KINDS, sweep

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "bench/results"
BEGIN, END = "<!-- written by python bench/report.py --readme -->", "<!-- written until here -->"
CONTESTS = {"cpu.json": "cpu", "cuda.json": "cuda"}  # where there are results of these, and the word that selects them
TRITONS = "Triton's"  # way of launching
FAMILIES = {"layer": "layers by themselves", "stack": "stacks of equal layers", "mlp": "MLP blocks of two layers"}

Line = tuple[str, str, str]  # what, figure, by


def block() -> str:
    """The table, with its markers."""
    lines: list[Line] = [
        *networks(),
        first_call(),
        stacked(),
        *families(),
        calls(),
        others(),
        launches(),
        laplacian(),
        recording(),
        shapes(),
        *memory(),
    ]
    rows = [("", "figure", "by"), ("---",) * 3, *lines]
    return "\n".join([BEGIN, *(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows), END])


def write() -> int:
    README.write_text(_replaced(README.read_text(), block()))
    return 0


def check() -> int:
    """1 where README.md has another table than the files give."""
    text = README.read_text()
    if text == _replaced(text, block()):
        return 0
    print("README.md has other figures than bench/results: run python bench/report.py --readme", file=sys.stderr)
    return 1


def _replaced(text: str, new: str) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must have one line {BEGIN} and one {END}")
    before, _, rest = text.partition(BEGIN)
    return before + new + rest.partition(END)[2]


def _results(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / file).read_text())


def _by(command: str, file: str, *more: str) -> str:
    return ", ".join([f"`{command}`", f"[data](bench/results/{file})", *more])


# ---------------------------------------------------------------------------------------------- figures in words


def two(value: float) -> str:
    """Two digits: 7.0, 36, 120."""
    return f"{value:#.2g}".removesuffix(".") if value < 100 else f"{value:.0f}"


def spaced(number: int) -> str:
    """65 536; below 10 000 as it is."""
    return str(number) if number < 10_000 else f"{number:,}".replace(",", " ")


def listed(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def between(values: list[float]) -> str:
    low, high = two(min(values)), two(max(values))
    return low if low == high else f"{low} to {high}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# ---------------------------------------------------------------------------------------------- lines


def networks() -> list[Line]:
    """Four networks of cpu.json, the fused ones with the module's own parameters."""
    record = _results("cpu.json")
    rows = record["rows"]

    def over(name: str, kind: str, way: str = "fused") -> str:
        return two(rows[f"{name}-{kind}"][way]["over_best_compile"])

    def both(name: str) -> str:
        return f"{over(name, 'F')} and {over(name, 'FB')} times"

    where = f"{record['cores']} cores, {record['instruction_set']}"
    opponent = f"whole networks on a CPU ({where}) against the better of `torch.compile`'s two modes, fp32"
    forward, training = over("a65536", "F"), over("a65536", "FB")
    pictures = [f"[{what}](bench/results/cpu-{what}.png)" for what in ("speedup", "roofline")]
    profile = "[where the time goes](bench/results/profile-cpu.json)"
    f1000 = f"{both('f1000')}; {over('f1000', 'FB', 'stacked')} for forward + backward with stacked parameters"
    return [
        (
            f"{opponent}: 13 × width 3, batch {spaced(named('a65536').M)}",
            f"forward {forward} times as fast, forward + backward {training}",
            _by("pytest bench/ --benchmark -k cpu", "cpu.json", *pictures, profile),
        ),
        (f"1000 × width 16, batch {named('f1000').M}", f1000, "same"),
        (f"16 × width 64, batch {spaced(named('c65536').M)}", both("c65536"), "same"),
        (f"8 × width 1024, batch {named('d-fp32').M}", both("d-fp32"), "same"),
    ]


def first_call() -> Line:
    record = _results("first-call-cpu.json")
    built, found = (record["medians"][way]["first call"] for way in ("built", "found again"))
    figure = f"{two(built)} s on {record['cores']} cores; {found:.2f} s"
    return (
        "a first call, which builds the engine; and the next process's",
        figure,
        _by("python bench/first_call.py", "first-call-cpu.json"),
    )


def stacked() -> Line:
    """The module for whole networks."""
    rows = _results("cpu.json")["rows"]
    words = {
        "a1": "13 × width 3, one row",
        "c1": "17 × width 64, one row",
        "f100": "100 × width 32, 256 rows",
        "f1000": "1000 × width 16, 64 rows",
    }
    figures = [two(rows[f"{name}-FB"]["stacked"]["over_best_compile"]) for name in words]
    what = "`FusedResidualStack` against the same opponents, forward + backward: " + "; ".join(words.values())
    return what, f"{listed(figures)} times as fast", _by("pytest bench/ --benchmark -k cpu", "cpu.json")


def families() -> list[Line]:
    """Of families that were measured on a device."""
    lines = []
    for file, device in CONTESTS.items():
        rows = list(_results(file)["rows"].values()) if (RESULTS / file).exists() else []
        for family, words in FAMILIES.items():
            if found := [row for row in rows if row.get("family") == family and row["best_compile"]]:
                by = _by(f'pytest bench/ --benchmark -k "{device} and {family}"', file)
                lines.append((f"{words}, {_range_of(found)}, {device}", _ratios_of(found), by))
    return lines


def _range_of(rows: list[dict[str, Any]]) -> str:
    (narrow, wide), (few, many) = (
        (min(of), max(of)) for of in ([row[size] for row in rows] for size in ("width", "M"))
    )
    width = f"{narrow} to {wide}" if narrow < wide else str(wide)
    return f"width {width}, {spaced(few) + ' to ' if few < many else ''}{spaced(many)} rows"


def _ratios_of(rows: list[dict[str, Any]]) -> str:
    """From the least to the largest ratio to the better compilation: the stack's where it is one, else the layers'."""
    figures = []
    for kind, words in (("F", "forward"), ("FB", "forward + backward"), ("S", "a full step")):
        of = [row.get("stacked", row["fused"])["over_best_compile"] for row in rows if row["pass"] == kind]
        figures += [f"{words} {between(of)}"] if of else []
    return f"{', '.join(figures)} times as fast as the better of both modes"


def calls() -> Line:
    """Layers too small for anything but their calls to count."""
    layers = _results("overhead-cpu.json")["milliseconds"]

    def over(name: str, kind: str) -> str:
        found = [times[kind] for title, times in layers.items() if title.startswith(f"{name} [")]
        return between([ways["eager"]["median"] / ways["fusedres"]["median"] for ways in found])

    names = dict.fromkeys(title.partition(" [")[0] for title in layers if "stubbed" not in title)
    figures = [f"{name} {over(name, 'forward')} and {over(name, 'training')}" for name in names]
    return (
        "one layer of 1 to 64 rows and width 16 to 128, called by itself on one thread, forward and forward + backward "
        "against eager on the same CPU",
        f"{'; '.join(figures)} times as fast",
        _by("python bench/overhead.py --device cpu", "overhead-cpu.json"),
    )


def others() -> Line:
    """Other people's models, as they are, fused in place, and compiled by the backend."""
    rows = {row["model"]: row["milliseconds"] for row in _results("models-cpu.json")["rows"]}

    def times(name: str, way: str, opponent: str) -> list[float]:
        return [mode[opponent]["median"] / mode[way]["median"] for mode in rows[name].values()]

    fused = [name for name, modes in rows.items() if "fused" in modes["forward"]]
    figures = [
        f"{name} {' and '.join(f'{one:.2g}' for one in times(name, 'fused', 'eager'))} "
        f"({' and '.join(f'{one:.2g}' for one in times(name, 'fused', 'compile'))})"
        for name in fused
    ]
    backend = between([one for name in rows for one in times(name, "backend", "compile")])
    return (
        "models of others with `fuse_`, forward and forward + backward, against eager (against `torch.compile`) on the "
        "same CPU: the Mixer of mlp-mixer-pytorch, GPT-2 and ViT of transformers, a tabular ResNet, 16 layers of width "
        "64 for one row, one of relu(z) by itself; and the backend against `torch.compile`, with one model that has no "
        "layer of ours",
        f"{'; '.join(figures)} times as fast; the backend {backend} times",
        _by("python bench/models.py", "models-cpu.json"),
    )


def launches() -> Line:
    """What calls cost the host on their way to a GPU; no GPU is needed to measure it."""
    cases = _results("launch-cost.json")["cases"]

    def cost(name: str, way: str) -> str:
        return two(cases[name]["microseconds"][way]["median"])

    names = {"few rows": "8 × 64", "narrow": "256 × 64", "wide": "256 × 512"}
    figures = [
        f"{words} {cost(f'{name}, forward', 'ours')} and {cost(f'{name}, training', 'ours')} µs "
        f"({cost(f'{name}, forward', TRITONS)} and {cost(f'{name}, training', TRITONS)})"
        for name, words in names.items()
    ]
    return (
        "a layer's call on its way to a GPU, forward and training, without Triton's launcher and the library's "
        "products (and with Triton's own search for the compiled kernel), rows × width",
        "; ".join(figures),
        _by("python bench/launch_cost.py", "launch-cost.json"),
    )


def laplacian() -> Line:
    record = _results("laplacian-cpu.json")
    sizes = record["sizes"]

    def over(dtype: str, *activations: str) -> str:
        found = [one for one in record["found"] if one["dtype"] == dtype and one["activation"] in activations]
        low, high = (end(one["over_eager"] for one in found) for end in (min, max))
        digits = 2 if high < 1.2 or low < 1 else 1
        return f"{low:.{digits}f} to {high:.{digits}f}"

    what = "a physics-informed loss of Laplacians and its gradient"
    figure = (
        f"float32: gelu {over('float32', 'gelu')} times as fast, sin {over('float32', 'sin')}, "
        f"tanh {over('float32', 'tanh')}; float64, which is eager's formula, {over('float64', 'gelu', 'sin', 'tanh')}"
    )
    by = _by("python bench/laplacian.py", "laplacian-cpu.json")
    return f"{what}, {len(sizes) - 1} layers of width {max(sizes)}, against eager on the same CPU", figure, by


def recording() -> Line:
    record = _results("recording-cpu.json")
    costs = {one["model"]: percent(one["recording_costs"]) for one in record["found"]}
    after = max(abs(one["afterwards_costs"]) for one in record["found"])
    shape = f"{record['depth']} layers of width {record['width']}, batch {record['rows']}"
    return (
        f"a training step of {shape}, every step recorded, {record['threads']} threads",
        f"stack {costs['stack']} longer, modules by themselves {costs['layers']}, plain PyTorch by hooks "
        f"{costs['plain PyTorch']}, runs differ by points; recorded no more, {100 * after:.1f} % off at most",
        _by("python bench/recording.py", "recording-cpu.json"),
    )


def shapes() -> Line:
    rows = _results("sweep-cpu.json")["rows"]
    every = [(row, kind) for row in sweep() for kind in KINDS]
    missing = [(row, kind) for row, kind in every if f"{row}-{kind}" not in rows]
    slower = sum(row["is_slower"] for row in rows.values())
    least = min(row["over_eager"] for row in rows.values())
    Ms, widths, depths = zip(*((row.M, row.sizes[0], row.depth) for row, _ in every), strict=True)
    left_out = ""
    if missing:
        words = {"F": "forward", "FB": "forward + backward"}
        names = [f"{words[kind]} of {spaced(row.M)} × {row.sizes[0]} × {row.depth}" for row, kind in missing[:3]]
        names += [f"{len(missing) - 3} more"] if len(missing) > 3 else []
        left_out = f"; left out for their time: {listed(names)}"
    return (
        f"{len(every)} shapes of {min(Ms)} to {spaced(max(Ms))} rows, width {min(widths)} to {max(widths)}, depth "
        f"{min(depths)} to {max(depths)}, forward and forward + backward, against eager on the same CPU",
        f"{slower or 'none'} of the {len(rows)} measured {'are' if slower > 1 else 'is'} slower beyond noise, "
        f"the least ratio is {two(least)}{left_out}",
        _by("python bench/sweep.py", "sweep-cpu.json", "[picture](bench/results/sweep-cpu.png)"),
    )


def memory() -> list[Line]:
    rows = _results("memory-cpu.json")["rows"]

    def mib(name: str, way: str) -> str:
        return f"{rows[name]['peaks'][way]['bytes'] / 2**20:.0f}"

    def deep(way: str) -> str:
        return listed([mib(name, way) for name in ("h16", "h64", "h128")])

    c, g = "c65536", "g64"
    return [
        (
            "memory that forward + backward add, 16 × width 64, batch 65 536",
            f"eager {mib(c, 'eager')} MiB, recomputing {mib(c, 'recompute')}, as it chooses by itself {mib(c, 'auto')}",
            _by("python bench/memory.py --row c65536 g64 h16 h64 h128", "memory-cpu.json"),
        ),
        (
            "the same for 64 × width 128, batch 65 536",
            f"eager {mib(g, 'eager')} MiB, kept {mib(g, 'keep')}, recomputing, as it chooses, {mib(g, 'auto')}",
            "same",
        ),
        (
            "the same for 1000 layers, batch 4096, width 16, 64 and 128",
            f"eager {deep('eager')} MiB, kept {deep('keep')}, recomputing, as it chooses, {deep('auto')}",
            "same",
        ),
    ]
