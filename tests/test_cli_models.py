"""compare, explain and bench from the command line: by sizes, and of what a callable of the user's returns."""

from __future__ import annotations

import importlib
import json
import sys
import types
from functools import partial

import command
import pytest
import torch
from torch import nn

import fusedres
from fusedres import gradients
from fusedres.cli import bench

HAS_GPU = torch.cuda.is_available()
RAISED = "comparing raised KeyError: torch.Size([3])"


@pytest.fixture
def run(capsys):
    return partial(command.run, capsys)


# ------------------------------------------------------------------------------------------------ compare, explain


def factory(monkeypatch, function):
    """A module of the user's with a callable `make`."""
    module = types.ModuleType("of_the_user")
    module.make = function
    monkeypatch.setitem(sys.modules, "of_the_user", module)
    return "of_the_user:make"


def twins():
    fused = fusedres.FusedResidualStack([6, 6, 3])
    return fused, fused.to_eager(), torch.randn(4, 6)


@pytest.mark.usefixtures("engine")
def test_compare_by_sizes(run, tmp_path):
    out = tmp_path / "new" / "folder"
    arguments = ["--sizes", "6,6", "6", "3", "--skip", "projection", "--activation", "gelu_tanh", "--rows", "7"]
    code, printed, err = run("compare", *arguments, "--device", "cpu", "--out", out)
    assert (code, err) == (0, "")
    for said in (
        "fused: loss ",
        "3 of 3 layers take a skip",
        "layers.2.0.weight",
        "projections.2.weight",
        "fused and eager agree in 4 of 4 layers",
        "fused calls: 1 × native, because the C++ engine runs on the CPU",
        f"Written: {out / 'compare.png'} {out / 'compare.json'}",
    ):
        assert said in printed
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "compare.json").read_text())
    assert found["agrees"]
    assert found["fused_calls"][0]["backend"] == "native"


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_compare_in_other_dtypes(dtype, run):
    code, printed, _ = run("compare", "--sizes", "8", "8", "4", "--dtype", dtype, "--device", "cpu", "--no-skips")
    assert code == 0
    assert "0 of 2 layers take a skip" in printed


def test_a_seed_draws_what_it_drew(run):
    small = ["compare", "--sizes", "4", "4", "--rows", "2", "--json"]
    first, again, other = (json.loads(run(*small, "--seed", seed)[1]) for seed in (1, 1, 2))
    assert first["eager"] == again["eager"]
    assert first["eager"] != other["eager"]


def test_factories_may_return_a_target_or_arguments_by_name(run, monkeypatch):
    target = torch.randn(4, 3)
    losses = []
    for answer in (
        lambda: (*twins(), target),
        lambda: dict(zip(("fused", "eager", "x"), twins(), strict=True), target=target),
    ):
        code, out, _ = run("compare", factory(monkeypatch, answer), "--json")
        assert code == 0
        losses.append(json.loads(out)["eager"]["loss"])
    assert losses[0] == losses[1]
    _, eager, x = twins()
    assert json.loads(run("compare", factory(monkeypatch, lambda: (eager, eager, x)), "--json")[1])["fused_calls"] == []
    _, printed, _ = run("compare", factory(monkeypatch, lambda: (eager, eager, x)))
    assert printed.endswith("fused calls: none, so that nothing fused is compared here\n")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda: 3, "fused, eager, x, target, loss_fn, got int\n"),
        (lambda: (1, 2), "fused, eager, x, target, loss_fn, got tuple of 2\n"),
        (lambda: {"fused": 1, "loss": 2}, "fused, eager, x, target, loss_fn, got a dict of fused, loss\n"),
        (lambda: (1, *twins()[1:]), "fused must be a torch.nn.Module, got int\n"),
        (lambda: (*twins()[:2], torch.randn(4, 5)), "x must be [..., 6]"),
        (lambda: (*twins()[:2], torch.randn(0, 6)), "x must hold numbers, for without them every gradient is 0 and"),
        (command.raises, f"of_the_user:make() raised RuntimeError: no data ({command.__file__}:"),
        (lambda: sys.exit(0), f"of_the_user:make() raised SystemExit: 0 ({__file__}:"),
        (lambda: (*[nn.Linear(8, 8)] * 2, torch.randn(3, 9)), "comparing raised RuntimeError: mat1 and mat2 shapes"),
        (lambda: (*[command.Raises(8, 8)] * 2, torch.randn(3, 8)), f"{RAISED} ({command.__file__}:"),
    ],
    ids=[
        *("a-number", "too-few", "other-names", "no-module", "wrong-x", "empty-x"),
        *("raises", "exits", "wrong-x-of-no-stack", "model-raises"),
    ],
)
def test_a_bad_factory_is_said_in_one_line(answer, said, run, monkeypatch):
    code, out, err = run("compare", factory(monkeypatch, answer))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert err.startswith("fusedres compare: ")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name' ({}:1)"),
        ("raise SystemExit(0)", "SystemExit: 0 ({}:1)"),
        ("def make(:", "SyntaxError: invalid syntax (broken_of_the_user.py, line 1)"),
    ],
    ids=["missing", "exits", "no-python"],
)
def test_a_module_that_does_not_import_is_said(source, said, run, monkeypatch, tmp_path):
    path = tmp_path / "broken_of_the_user.py"
    path.write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    importlib.invalidate_caches()
    code, out, err = run("compare", "broken_of_the_user:make")
    assert (code, out) == (2, "")
    assert err == f"fusedres compare: module broken_of_the_user does not import: {said.format(path)}\n"


def test_what_a_module_of_the_user_raises_is_explained_in_one_line(run, monkeypatch):
    code, out, err = run("explain", factory(monkeypatch, lambda: (command.Raises(8, 8), torch.randn(3, 8))))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"fusedres explain: {RAISED.replace('comparing', 'explaining')} ({command.__file__}:")


def test_a_bug_of_ours_is_no_bad_use(run, monkeypatch):
    def fails(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(gradients, "compare_gradients", fails)
    with pytest.raises(ValueError, match="a bug"):
        run("compare", "--sizes", "3,3")


def test_memory_that_is_lacking_is_said(run, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(gradients, "compare_gradients", fails)
    said = "there is not enough memory for this: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert run("compare", "--sizes", "3,3") == (2, "", f"fusedres compare: {said}\n")


@pytest.mark.usefixtures("engine")
def test_explain(run, monkeypatch):
    code, printed, _ = run("explain", "--sizes", "8", "8", "8", "--rows", "3", "--device", "cpu")
    assert code == 0
    assert printed.startswith("network [3, 8] -> [3, 8] torch.float32, 2 layers: native, because the C++ engine runs")

    made = factory(monkeypatch, lambda: (fusedres.FusedResidualLinear(6), torch.randn(2, 6)))
    code, out, err = run("explain", made, "--json")
    assert code == 0
    assert err.startswith("residual_linear [2, 6] -> [2, 6]")
    (call,) = json.loads(out)["calls"]
    assert {name: call[name] for name in ("M", "N", "K", "dtype", "layers", "backend", "way")} == {
        "M": 2,
        "N": 6,
        "K": 6,
        "dtype": "float32",
        "layers": 1,
        "backend": "native",
        "way": "lanes",
    }
    code, out, err = run("explain", factory(monkeypatch, lambda: 3))
    assert (code, err) == (2, "fusedres explain: module:factory must return (module, x), got int\n")


def test_explain_tells_tiles(run, monkeypatch):
    """Of Triton's kernels, which the suite interprets on a CPU."""
    made = factory(
        monkeypatch, lambda: (fusedres.FusedResidualLinear(16).to(device), torch.randn(2, 16, device=device))
    )
    device = "cuda" if HAS_GPU else "cpu"
    (call,) = json.loads(run("explain", made, "--json")[1])["calls"]
    assert call["backend"].startswith("triton")
    assert set(call["tiles"]) == {"form", "forward", "training", "backward", "weight"}
    assert call["tiles_because"].keys() == set(call["tiles"]) - {"form"}
    assert "not measured" in call["tiles_because"]["forward"]
    assert call["tiles"]["forward"]["BLOCK_M"] > 0
    assert call["tiles"]["backward"]["form"] == "Together"


# ------------------------------------------------------------------------------------------------ bench


@pytest.mark.usefixtures("engine")
def test_bench(run, monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 9)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    code, out, err = run("bench", "--sizes", "8", "8", "--rows", "4", "--device", "cpu", "--compile", "--json")
    assert code == 0
    times = json.loads(out)["milliseconds"]
    assert list(times) == ["forward", "forward + backward"]
    assert len(compiled) == 1
    for one in times.values():
        assert list(one) == ["fused", "eager", "compiled"]
        for facts in one.values():
            low, high = facts["quartiles"]
            assert 0 < low <= facts["median"] <= high
            assert facts["turns"] == 9
    assert "the full benchmarks are in bench/ of the repository" in err


@pytest.mark.usefixtures("engine")
def test_bench_of_a_wrong_answer_fails(run, monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "_timed", lambda calls, x, seconds: {"fused": {"median": 1.0, "quartiles": [1.0, 1.0]}})
    command.break_gradients(monkeypatch)
    code, printed, _ = run("bench", "--sizes", "8", "8", "--rows", "4", "--device", "cpu")
    assert code == 1
    assert "layers.0.0 DIFFERS: " in printed
