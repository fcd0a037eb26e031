"""Tables and pictures of a record, and README.md's table, which says what the committed files of results say."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import pictures
import pytest
import readme
import report
from cases import Run, named
from contest import _facts, _ratios, rates

PEAKS = {"bytes_per_s": 2e10, "flops_per_s": 3e11}
NAMES = ("c1024", "post-m10", "layer-d64-m4096-fp32", "layer-d256-m4096-fp32", "stack-64x4-m16384-fp32",
         "mlp-tabular-m4096-fp32")  # fmt: skip


def times(median: float) -> dict:
    return {"median": median, "lower": 0.98 * median, "upper": 1.02 * median, "rounds": 9, "calls": 1, "spread": 0.04}


def row(run: Run) -> dict:
    """A row as the contest would write it, of times drawn by chance."""
    draw = random.Random(str(run))
    ways = ["eager", "compile", "compile-autotuned", "fused", *(["stacked"] if run.row.can_stack else [])]
    ms = {way: draw.uniform(1, 3) for way in ways}
    on_device = {view: {way: times(2 * t) for way, t in ms.items()} for view in ("cold", "warm", "graph")}
    is_cuda = run.device == "cuda"
    return {
        **_facts(run.row, run.kind, run.device),
        "milliseconds": {way: times(t) for way, t in ms.items()},
        **({"device_milliseconds": on_device, "peak_bytes": dict.fromkeys(ways, 3 << 20)} if is_cuda else {}),
        "headline": "cold" if is_cuda else "host",
        **_ratios(run.row, run.kind, run.device, ms),
        "rates": rates(run.row, run.kind, ms, PEAKS),
        "chosen": "by chance",
        "first_call_s": {"compile": 1.5},
        "failures": {},
        "remarks": {},
    }


def record(device: str = "cpu", names: tuple[str, ...] = NAMES) -> dict:
    runs = [Run(device, named(name), kind) for name in names for kind in ("F", "FB", "S")]
    return {
        "kind": "contest",
        "cpu": "a processor",
        "gpu": "a card",
        "threads": 2,
        "peaks": {device: {"float32": PEAKS}},
        "left_out": ["layer-d512-m4096-fp32-F"],
        "rows": {run.key: row(run) for run in runs},
    }


def test_tables_say_times_rates_and_what_was_left_out():
    found = record("cuda")
    said = report.said_of(found)
    assert "cuda float32    20 GB/s copied, 0.3 TFLOP/s multiplied" in said
    assert "no time for 1: layer-d512-m4096-fp32-F" in said
    one = found["rows"]["cuda-c1024-F"]
    line = next(line for line in report.contest_table(found).splitlines() if line.startswith("c1024 "))
    assert f"{one['device_milliseconds']['cold']['eager']['median']:.4g} ±2%" in line
    details = [line.split() for line in report.detail_table(found).splitlines() if line.startswith("c1024 ")]
    eager = next(cells for cells in details if cells[2:4] == ["F", "eager"])
    assert eager[4:12:2] == [f"{t:.4g}" for t in (one["milliseconds"]["eager"]["median"],) + 3 * (
        one["device_milliseconds"]["warm"]["eager"]["median"],)]  # fmt: skip
    share = one["rates"]["eager"]["share_of_roofline"]
    assert eager[14:16] == [f"{share:.0%}", "3.0"]
    written = report.markdown(found)
    assert written.count("\n| c1024 |") == 3 + 3 * 5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pictures_are_drawn(tmp_path, device):
    drawn = pictures.draw(record(device), tmp_path / "new folder", "one")
    assert [path.name for path in drawn] == ["one-speedup.png", "one-roofline.png"]
    assert all(path.stat().st_size > 20_000 for path in drawn)


def test_without_ceilings_there_is_no_roofline(tmp_path):
    committed = json.loads((readme.RESULTS / "cpu.json").read_text())
    del committed["peaks"]
    assert [path.name for path in pictures.draw(committed, tmp_path, "cpu")] == ["cpu-speedup.png"]


def test_a_speed_up_is_that_of_the_quicker_of_ours():
    one = {"fused": {"over_eager": 2.0, "over_best_compile": None}, "stacked": {"over_eager": 3.0}}
    one["stacked"]["over_best_compile"] = 1.5
    assert pictures.speedup(one, "eager") == 3.0
    assert pictures.speedup(one, "best_compile") == 1.5
    assert pictures.speedup({"fused": one["fused"]}, "best_compile") is None


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    return report.main()


def test_one_command_makes_table_markdown_and_pictures(tmp_path, monkeypatch, capsys):
    file = tmp_path / "found.json"
    file.write_text(json.dumps(record()))
    assert run(monkeypatch, file, "--markdown", tmp_path / "found.md", "--pictures", tmp_path) == 0
    said = capsys.readouterr().out
    assert "bars met" in said
    assert f"drawn: {tmp_path / 'found-roofline.png'}" in said
    assert "| c1024 | cpu | F |" in (tmp_path / "found.md").read_text()

    file.write_text(json.dumps({"kind": "memory"}))
    for wrong in ([file], [], ["--check"], [file, "--readme"]):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, *wrong)
        assert ended.value.code == 2


# ---------------------------------------------------------------------------------------------- the README


def test_the_readme_says_what_the_files_say():
    assert readme.check() == 0, "python bench/report.py --readme writes it"


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """README.md and the results, as copies to be changed."""
    shutil.copytree(readme.RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))
    shutil.copy(readme.README, tmp_path / "README.md")
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    return tmp_path


def changed(file: Path, change) -> None:
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


FIGURES = {
    "cpu.json": (lambda d: d["rows"]["a65536-F"]["fused"].update(over_best_compile=98.7), "forward 99 times as fast"),
    "overhead-cpu.json": (
        lambda d: d["milliseconds"]["relu(z) [64, 64]"]["training"].update(
            eager={"median": 1}, fusedres={"median": 0.1}
        ),
        " to 10 times as fast | `python bench/overhead.py",
    ),
    "launch-cost.json": (
        lambda d: d["cases"]["wide, forward"]["microseconds"]["ours"].update(median=7.77),
        "256 × 512 7.8 and ",
    ),
    "first-call-cpu.json": (lambda d: d["medians"]["built"].update({"first call": 17.0}), "17 s on 2 cores"),
    "laplacian-cpu.json": (lambda d: d["found"][0].update(over_eager=3.0), "gelu 1.5 to 3.0 times"),
    "recording-cpu.json": (lambda d: d["found"][0].update(recording_costs=0.11), "stack 11 % longer"),
    "sweep-cpu.json": (lambda d: d["rows"]["1x1x1-F"].update(is_slower=True), "1 of the 299 measured is slower"),
    "memory-cpu.json": (lambda d: d["rows"]["g64"]["peaks"]["keep"].update(bytes=7 << 20), "eager 4129 MiB, kept 7,"),
}


@pytest.mark.parametrize("file", FIGURES)
def test_a_figure_follows_its_file(copied, monkeypatch, capsys, file):
    change, expected = FIGURES[file]
    changed(copied / "results" / file, change)
    assert run(monkeypatch, "--readme", "--check") == 1
    assert "other figures" in capsys.readouterr().err
    assert expected not in readme.README.read_text()
    assert run(monkeypatch, "--readme") == 0
    assert run(monkeypatch, "--readme", "--check") == 0
    assert expected in readme.README.read_text()


def test_a_figure_changed_by_hand_is_found(copied):
    text = readme.README.read_text()
    begin = text.index(readme.BEGIN)
    readme.README.write_text(text[:begin] + text[begin:].replace("817 MiB", "917 MiB", 1))
    assert readme.check() == 1
    readme.write()
    assert readme.README.read_text() == text


def test_families_get_their_lines_once_they_are_measured(copied):
    (copied / "results/cuda.json").write_text(json.dumps(record("cuda")))
    rows = record("cuda")["rows"]
    ratios = [rows[f"cuda-layer-d{d}-m4096-fp32-F"]["fused"]["over_best_compile"] for d in (64, 256)]
    said = readme.block()
    assert "layers by themselves, width 64 to 256, 4096 rows, cuda" in said
    assert f"forward {readme.between(ratios)}, " in said


def test_a_readme_without_its_markers_is_refused(copied):
    readme.README.write_text("# fusedres\n")
    with pytest.raises(ValueError, match="must have one line <!-- written by"):
        readme.write()


def test_figures_in_words():
    assert [readme.two(value) for value in (7.01, 35.5, 9.96, 0.98, 123.4)] == ["7.0", "36", "10", "0.98", "123"]
    assert [readme.spaced(number) for number in (4096, 65536, 2097152)] == ["4096", "65 536", "2 097 152"]
    assert [readme.listed(words) for words in (["a"], ["a", "b", "c"])] == ["a", "a, b and c"]
