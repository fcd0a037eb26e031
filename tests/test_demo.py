"""The demo: what it writes, what it answers, and that a wrong gradient fails it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedres
from fusedres import cli, native
from fusedres.cli.device import set_interpreter
from fusedres.studies import demo

ROOT = Path(__file__).parent.parent
HAS_GPU = torch.cuda.is_available()


def run(*arguments, **variables):
    """`python -m fusedres …` where nothing else yet says whether Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", "fusedres", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("is_interpreted", [False, pytest.param(True, marks=pytest.mark.skipif(HAS_GPU, reason="CPU"))])
def test_the_demo_runs_end_to_end(is_interpreted, tmp_path):
    variables = {"TRITON_INTERPRET": "1"} if is_interpreted else {}
    done = run("demo", "--out", tmp_path / "out", "--epochs", "1", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "A, case 2: no two widths alike, with skips\nfused: loss",
        "0 of 7 layers take a skip",
        "5 of 5 layers take a skip",
        "gradients.png",
        "Fused and eager agree",
    ):
        assert said in done.stdout
    if is_interpreted or (not HAS_GPU and native.missing()):
        assert done.stdout.startswith("no GPU: Triton kernels run through Triton's interpreter on the CPU")
        assert "triton-interpreter" in done.stdout
        assert "both run the eager formula" in done.stdout
    elif not HAS_GPU:
        assert done.stdout.startswith("no GPU: the C++ engine runs on the CPU")
        assert "torch.float32: native, because" in done.stdout
        assert "Fused trains through the C++ engine" in done.stdout

    for picture in ("gradients.png", "training.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    gradients = json.loads((tmp_path / "out" / "gradients.json").read_text())
    assert [list(pair) for pair in gradients["cases"].values()] == [["with skips", "without skips"]] * 3
    comparisons = [one for pair in gradients["cases"].values() for one in pair.values()]
    assert all(one["agrees"] for one in comparisons)
    relative = [errors["relative"] for one in comparisons for errors in one["parameters"].values()]
    assert 0 < max(relative) <= 1e-4  # 0 would mean that no kernel ran
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert len(training["fused"]["losses"]) == len(training["eager"]["losses"]) == 1437 // demo.BATCH


@pytest.mark.parametrize(
    ("was", "is_wanted", "becomes"),
    [("0", True, "1"), ("1", False, "0"), ("1", True, None), ("0", False, None)],
    ids=["compiling-to-interpreting", "interpreting-to-compiling", "interprets-already", "compiles-already"],
)
def test_triton_imported_for_the_other_mode_starts_anew(was, is_wanted, becomes, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments))
    monkeypatch.setitem(sys.modules, "triton", sys)
    monkeypatch.setenv("TRITON_INTERPRET", was)
    set_interpreter(is_wanted, ["demo", "--seed", "1"])
    assert started == ([[sys.executable, "-m", "fusedres", "demo", "--seed", "1"]] if becomes else [])
    assert os.environ["TRITON_INTERPRET"] == (becomes or was)


def test_a_missing_package_is_said_before_anything_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "sklearn" else object())
    arguments = ["demo", "--out", str(tmp_path / "out"), *([] if HAS_GPU else ["--device", "cpu"])]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == "fusedres demo: the demo needs sklearn: pip install fusedres[demo]\n"
    assert not (tmp_path / "out").exists()


def wrong_in_one_layer(sizes, has_skips):
    model = demo._fused_projections(sizes, has_skips)
    model.layers[0][0].weight.register_hook(lambda gradient: 1.001 * gradient)
    return model


def judge(monkeypatch, case, seed, device, loss_difference=0.0):
    monkeypatch.setattr(demo, "CASES", (case,))
    return demo.verdict(demo.compare_cases(seed, torch.device(device)), loss_difference)


def test_a_wrong_gradient_fails_the_demo(monkeypatch, capsys, device):
    projections = demo.CASES[2]
    assert judge(monkeypatch, projections, 0, device) == []
    failed = judge(monkeypatch, projections._replace(fused=wrong_in_one_layer), 0, device)
    assert [one.partition(" by ")[0] for one in failed] == [
        "D: projections, with skips: layers.0.0 DIFFERS: weight is off",
        "D: projections, without skips: layers.0.0 DIFFERS: weight is off",
    ]
    assert f"FAILED {failed[0]}" in capsys.readouterr().out


@pytest.mark.skipif(HAS_GPU, reason="that eager's slope cancels to 0 at this seed was seen on a CPU")
def test_where_eager_cancels_to_zero_float64_is_the_judge(monkeypatch, capsys, device):
    """Eager's gelu'(z) = Φ(z) + z φ(z) is 0 near z = -5 in float32: relative to that any other rounding is infinite."""
    assert judge(monkeypatch, demo.CASES[0], 26, device) == []
    assert "inf relative (layers.11.0.weight)" in capsys.readouterr().out


@pytest.mark.parametrize("difference", [1e-3, math.nan])
def test_curves_that_part_fail_the_demo(difference, capsys):
    assert len(demo.verdict({}, difference)) == 1
    assert "FAILED training: losses differ by" in capsys.readouterr().out


def test_a_loss_that_is_not_a_number_is_a_difference():
    trainings = {"fused": demo.Training(losses=[1.0, math.nan, 1.0]), "eager": demo.Training(losses=[1.0, 1.0, 1.0])}
    assert math.isnan(demo._largest_difference(trainings))


def test_training_tells_a_wrong_layer(monkeypatch):
    """On the CPU both run one formula, so that the curves are equal to the bit; with another formula they part."""
    device = torch.device("cpu")
    assert demo._largest_difference(demo.train_both(1, 0, device)) == 0

    class Wrong(fusedres.FusedResidualLinear):
        def forward(self, x):
            return super().forward(x) * 1.001

    monkeypatch.setitem(demo._LAYERS, "fused", Wrong)
    assert demo._largest_difference(demo.train_both(1, 0, device)) > demo.FP32_LOSSES
