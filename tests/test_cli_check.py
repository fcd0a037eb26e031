"""check from the command line: that it holds here, and that what is wrong fails it."""

from __future__ import annotations

import json
from functools import partial

import command
import pytest
import torch

import fusedres
from fusedres import cli, dispatch, functional, native
from fusedres.cli import selftest


@pytest.fixture
def run(capsys):
    return partial(command.run, capsys)


@pytest.fixture
def few(monkeypatch):
    """One dtype, few layers, one stack."""
    monkeypatch.setattr(selftest, "DTYPES", (torch.float32, torch.float16))
    monkeypatch.setattr(selftest, "STACKS", {"small": ([8, 8, 3], {}, 5)})
    every = selftest.layers
    monkeypatch.setattr(selftest, "layers", lambda is_compiled: every(True))


@pytest.mark.usefixtures("engine", "few")
def test_check(run):
    code, printed, err = run("check", "--device", "cpu")
    assert (code, err) == (0, "")
    lines = [line.split(maxsplit=1) for line in printed.splitlines()]
    assert [line[0] for line in lines[:-2]] == ["ok"] * 5 + ["-"]
    assert lines[0][1].split() == ["cpu", "the", "C++", "engine", "loaded,", "for", fusedres.toolchain.level()]
    assert "7 layers against float64" in printed
    assert "no kernels for torch.float16" in printed
    assert printed.splitlines()[-1].startswith("all 5 checks hold, in ")


def test_every_option_is_checked():
    covering, every = selftest.layers(is_compiled=True), selftest.layers(is_compiled=False)
    for name in ("activation", "order", "skip"):
        assert {getattr(one, name) for one in covering} == {getattr(one, name) for one in every}
    assert {one.activation for one in covering} == set(selftest.ACTIVATIONS)
    assert len(every) == 7 * (2 * 4 - 1)
    assert {(one.rows, one.width) for one in covering} == set(selftest.SHAPES)


@pytest.mark.usefixtures("engine", "few")
def test_a_wrong_layer_fails_the_check(run, monkeypatch):
    right = functional.residual_linear
    monkeypatch.setattr(functional, "residual_linear", lambda *a, **options: right(*a, **options) * 1.001)
    code, out, err = run("check", "--device", "cpu", "--json")
    assert code == 1
    found = {(one["where"], one["what"]): one for one in json.loads(out)["checks"]}
    assert [one["what"] for one in found.values() if one["holds"] is False] == [
        "7 layers against float64",
        "4 layers of whole numbers",
    ]
    assert found["cpu float32", "7 layers against float64"]["measured"].startswith(
        "gelu, order pre, skip identity, [1, 8]: "
    )
    assert "y is not exact, and " in found["cpu float32", "4 layers of whole numbers"]["measured"]
    assert "2 of 5 checks failed, in " in err


@pytest.mark.usefixtures("engine", "few")
def test_a_wrong_stack_and_other_bits_fail_the_check(run, monkeypatch):
    command.break_gradients(monkeypatch)
    right = functional.residual_linear
    monkeypatch.setattr(
        functional, "residual_linear", lambda *a, **options: right(*a, **options) + 1e-10 * torch.rand(()).item()
    )
    code, printed, _ = run("check", "--device", "cpu")
    assert code == 1
    failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
    assert any("two runs" in line and "y has other bits" in line for line in failed)
    assert any("stack, small" in line and "DIFFERS" in line for line in failed)


@pytest.mark.usefixtures("engine", "few")
def test_a_check_that_raises_has_failed(run, monkeypatch):
    monkeypatch.setattr(functional, "residual_linear", lambda *a, **options: command.raises())
    code, printed, _ = run("check", "--device", "cpu")
    assert code == 1
    assert "4 layers of whole numbers     raised RuntimeError: no data\n" in printed


def test_an_engine_that_could_be_there_and_is_not_fails_the_check(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "the build failed: disk on fire")
    monkeypatch.setattr(fusedres.toolchain, "find_compiler", lambda: None)
    assert selftest.engine() == ("cpu", "the C++ engine", False, "not there: the build failed: disk on fire")
    monkeypatch.setattr(native, "missing", lambda: native.SWITCHED_OFF)
    assert selftest.engine().holds is None


def test_a_machine_that_runs_nothing_fused_fails_the_check(run, monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: native.SWITCHED_OFF)
    monkeypatch.setattr(dispatch, "backend", lambda device, dtype: dispatch.Eager("nothing is installed"))
    code, printed, err = run("check", "--device", "cpu")
    assert (code, err) == (1, "")
    assert printed.splitlines()[-2:] == [
        "FAILED: nothing fused runs here: nothing is installed",
        "What would: on a CPU the C++ engine, with a C++ compiler on PATH or in CXX and FUSEDRES_NATIVE not 0; "
        "Triton, with a GPU that torch sees",
    ]
    assert json.loads(run("check", "--device", "cpu", "--json")[1])["holds"] is False


def test_help_says_what_the_exit_code_means(capsys):
    with pytest.raises(SystemExit):
        cli.main(["check", "--help"])
    assert "Exit code 1: a check failed, or nothing fused runs on this machine." in capsys.readouterr().out
