"""The table of benchmarks: words select what they say, committed results still have their rows, work is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cases
import pytest
from cases import ROWS, Row, Run, runs

RESULTS = Path(__file__).parent.parent / "bench/results"
RUNS = list(runs())


def test_every_run_has_a_name_of_its_own():
    assert len({str(run) for run in RUNS}) == len({run.key for run in RUNS}) == len(RUNS)
    assert {run.kind for run in RUNS} == {"F", "FB", "S"}


@pytest.mark.parametrize("word", ["cpu", "cuda", "layer", "stack", "mlp"])
def test_a_word_selects_what_it_names(word):
    named = [run for run in RUNS if word in str(run)]
    assert named == [run for run in RUNS if word in (run.device, run.row.family)]
    assert named
    assert word not in "bench/test_contest.py::test_answers_and_times", "it would select everything"


def test_committed_results_have_rows_of_the_table():
    found = json.loads((RESULTS / "cpu.json").read_text())["rows"]
    assert found.keys() <= {run.key for run in RUNS}
    assert all(row["M"] == cases.named(row["row"]).M for row in found.values())


def test_the_heavy_ones_are_not_for_the_cpu():
    for row in ROWS:
        assert row.source
        if "cpu" in row.devices and row.family != "network":
            assert row.work("FB").flops <= cases.CPU_FLOPS
            assert 3 * row.M * sum(row.sizes) * 4 <= cases.CPU_BYTES
    assert not [run for run in RUNS if run.device == "cpu" and run.row.name.startswith("layer-d8192-m65536")]
    on_cuda = {(run.row.sizes[0], run.row.M) for run in RUNS if run.device == "cuda" and run.row.family == "layer"}
    assert on_cuda == {(64 << i, M) for i in range(8) for M in (4096, 65536)}


def test_work_counts_what_must_move():
    layer = Row("one", (3, 3), 2, family="layer")
    x = y = g = dx = 2 * 3
    parameters = 3 * 3 + 3
    assert layer.work("F") == (4 * (x + y + parameters), 2 * 2 * 9)
    assert layer.work("FB") == (4 * (x + y + x + g + dx + 3 * parameters), 3 * 2 * 2 * 9)
    assert layer.work("S") == (layer.work("FB").bytes + 4 * 7 * parameters, layer.work("FB").flops)
    alone = replace(layer, family="network")  # nobody wants its dx
    assert alone.work("FB") == (layer.work("FB").bytes - 4 * dx, 2 * 2 * 2 * 9)
    projected = replace(alone, sizes=(3, 2), rule="projection")
    assert projected.work("F") == (4 * (2 * 5 + 2 * (6 + 2)), 2 * 2 * 2 * 6)


def test_quick_checks_are_narrow_and_keep_their_proportions():
    assert cases.named("mlp-vit-m12608-fp32").narrowed(512, 64).sizes == (128, 512, 128)
    assert cases.named("stack-256x1000-m512-fp32").narrowed(512, 64).sizes == (256,) * 65
    assert cases.named("layer-d8192-m4096-fp32").narrowed(512, 64).sizes == (512, 512)
    assert cases.named("b512").narrowed(8, 1).sizes == cases.named("b512").sizes, "its skips depend on them"


def test_a_cpu_row_goes_by_its_own_name_in_a_file():
    row = cases.named("c1024")
    assert (Run("cpu", row, "F").key, Run("cuda", row, "F").key) == ("c1024-F", "cuda-c1024-F")
