"""The command line: as a process and by its main, with good and bad arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import command
import pytest
import torch

import fusedres
from fusedres import cli
from fusedres.cli import env

HAS_GPU = torch.cuda.is_available()
ROOT = Path(__file__).parent.parent
COMMANDS = "demo, compare, study, explain, bench, env, check, build"


@pytest.fixture
def run(capsys):
    return partial(command.run, capsys)


# ------------------------------------------------------------------------------------------------ as a process


TWINS = """
import ctypes, os
import torch
from torch import nn
from fusedres import FusedResidualStack

def right():
    print("said by Python"), os.write(1, b"said to the descriptor\\n"), ctypes.CDLL(None).puts(b"said by C")
    fused = FusedResidualStack([8, 8, 4])
    return fused, fused.to_eager(), torch.randn(5, 8)

def wrong():
    fused, eager, x = right()
    fused.to_eager()
    eager.layers[0][0].weight.register_hook(lambda gradient: gradient * 1.01)
    return dict(fused=eager, eager=fused, x=x)
"""


def test_version():
    done = command.process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fusedres {fusedres.__version__}\n", "")


@pytest.mark.parametrize(("factory", "code"), [("right", 0), ("wrong", 1)])
def test_a_factory_in_the_working_directory(factory, code, tmp_path):
    (tmp_path / "twins.py").write_text(TWINS)
    done = command.process("compare", f"twins:{factory}", "--json", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)  # nothing else is there
    assert done.stdout.count("\n") == 1
    assert found["agrees"] is (code == 0)
    assert [one["verdict"] for one in found["layers"].values()] == ["agrees" if code == 0 else "DIFFERS", "agrees"]
    assert f"fused and eager agree in {2 - code} of 2 layers" in done.stderr
    for whom in ("by Python", "to the descriptor", "by C"):
        assert f"said {whom}\n" in done.stderr


def test_bad_use_is_one_line():
    done = command.process("compare", "--rows", "0")
    said = "fusedres compare: --rows must be at least 1, got 0\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_env_builds_nothing(tmp_path):
    tool = tmp_path / "ptxas"
    tool.write_text("#!/bin/sh\necho Cuda compilation tools, release 99.9, V99.9.99\n")
    tool.chmod(0o755)
    done = command.process("env", "--json", FUSEDRES_CACHE=str(tmp_path / "cache"), TRITON_PTXAS_PATH=str(tool))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not (tmp_path / "cache").exists()
    assert found["caches"]["fusedres"] == {
        "path": str(tmp_path / "cache"),
        "state": "not there yet: made at first need",
    }
    assert found["ptxas"]["ptxas"] == {"version": "99.9", "path": str(tool)}
    assert found["variables"]["TRITON_PTXAS_PATH"] == str(tool)
    assert found["versions"]["torch"]["version"] == torch.__version__
    assert [one for one in found["runs"] if one.startswith("cpu")] == [f"cpu {dtype}" for dtype in env.DTYPES]
    if found["engine"]["state"] == "to build":
        assert found["runs"]["cpu float32"] == {"backend": "native", "because": found["engine"]["because"]}
        assert found["cpu"]["brgemm"] == "known once the engine is built"


STUB = """
import sys, types
stub = types.ModuleType("fusedres")
stub.__path__, stub.__version__ = [sys.argv[1]], "0"
sys.modules["fusedres"] = stub
from fusedres import cli
for name in cli.COMMANDS:
    assert cli.main([name, "--foo"]) == 2, name
    try:
        if name != "study":  # whose help reads files that have a test of their own
            cli.main([name, "--help"])
    except SystemExit as exit:
        assert exit.code == 0
assert "torch" not in sys.modules
"""


def test_no_command_imports_torch_before_it_runs():
    """The package around it does, so that a stub stands in its place."""
    done = subprocess.run(
        [sys.executable, "-c", STUB, str(ROOT / "fusedres")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "fusedres demo: unrecognized arguments: --foo"


# ------------------------------------------------------------------------------------------------ bad use


NAME = "NAME, ahead of a study's own options, must be one of vanish, gate, lambda, shortcut, depth"
MOST = "must be at most 2147483647"
FIT = "must fit into memory: x and the weights take"
FORM = "must name a module and a callable in it, as in models:twins or of.yours:twins"
ACTIVATIONS = "gelu, gelu_tanh, relu, silu, tanh, sin, none"
LEFT_OUT = "must be left out where module:factory says what to run"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("demo --epochs 0", "--epochs must be at least 1, got 0"),
        ("demo --device tpu", "--device must be one of cpu, cuda, got 'tpu'"),
        ("demo --seed x", "--seed must be an integer, got 'x'"),
        ("compare --sizes 3 3 x", "--sizes must be an integer, got 'x'"),
        ("compare --sizes 99999999999999999999 3", f"--sizes {MOST}, got 99999999999999999999"),
        ("compare --sizes 1000000 1000000", f"--sizes and --rows {FIT} 3,726 GiB, and there are 64 GiB"),
        ("explain --sizes 1000000 1000000", f"--sizes and --rows {FIT} 3,726 GiB, and there are 64 GiB"),
        ("compare --rows 100000000000000", f"--rows {MOST}, got 100000000000000"),
        ("compare --rows 2000000000 --sizes 16 4", f"--sizes and --rows {FIT} 119 GiB, and there are 64 GiB"),
        ("bench --seed 99999999999999999999", f"--seed {MOST}, got 99999999999999999999"),
        ("check --seed 2147483648", f"--seed {MOST}, got 2147483648"),
        ("compare --sizes 3,0", "--sizes must be at least 1, got 0"),
        ("compare --rows", "--rows expected one argument"),
        ("compare --row", "unrecognized arguments: --row"),
        ("explain --activation geglu", f"--activation must be one of {ACTIVATIONS}, got 'geglu'"),
        ("bench --dtype int8", "--dtype must be one of float32, float64, bfloat16, float16, got 'int8'"),
        ("bench --seconds 0", "--seconds must be at least 1, got 0"),
        ("compare m:f --rows 3", f"--rows {LEFT_OUT}, got m:f"),
        ("explain m:f --no-skips", f"--skip {LEFT_OUT}, got m:f"),
        ("compare m", f"module:factory {FORM}, got m"),
        ("compare ./m:f", f"module:factory {FORM}, got ./m:f"),
        ("compare of/m:f", f"module:factory {FORM}, got of/m:f"),
        ("explain .m:f", f"module:factory {FORM}, got .m:f"),
        ("compare :f", f"module:factory {FORM}, got :f"),
        ("compare nowhere.m:f", "module:factory must name a module, and there is no nowhere.m here or installed"),
        ("compare json:nothing", "module:factory must name a callable in json: nothing is not there"),
        ("compare json:__doc__", "module:factory must name a callable in json: __doc__ is not callable"),
        ("study", f"{NAME}, got ''"),
        ("study --json --seed 1", f"{NAME}, got ''"),
        ("study width", f"{NAME}, got 'width'"),
        ("study --width 3 vanish", f"{NAME}, got '--width'"),
        ("env now", "unrecognized arguments: now"),
    ],
)
def test_bad_arguments_are_said_in_one_line(arguments, said, run, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**24}[name])
    assert run(*arguments.split()) == (2, "", f"fusedres {arguments.split()[0]}: {said}\n")


def test_a_command_is_required(run):
    assert run() == (2, "", "fusedres: the following arguments are required: command\n")
    assert run("compere") == (2, "", f"fusedres: command must be one of {COMMANDS}, got 'compere'\n")


def test_options_that_make_no_sense_together_are_said_in_the_words_of_the_stack(run):
    code, out, err = run("compare", "--skip", "identity", "--sizes", "3", "4", "--device", "cuda" if HAS_GPU else "cpu")
    assert (code, out) == (2, "")
    assert err.startswith("fusedres compare: layer 0: skip='identity' adds the input to the output")
    assert err.count("\n") == 1


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["demo", "compare", "explain", "bench", "check"])
def test_a_missing_gpu_is_said(command, run):
    said = "--device cuda must be a GPU that torch sees: torch sees no CUDA device here"
    assert run(command, "--device", "cuda") == (2, "", f"fusedres {command}: {said}\n")


HELP = """\
usage: fusedres [-h] [--version] command

Fused residual layers for PyTorch. Commands, each with --help and --json:

  demo     fused and eager gradients side by side, and a classifier trained both ways
  compare  gradients of a fused network, or of a module of yours, against eager ones: a verdict per layer
  study    a write-up's claims, measured: a table, pictures, whether they hold
  explain  what would run each fused call of a network, or of a module of yours, and why
  bench    a short benchmark on this machine, fused against eager
  env      versions, GPU, compilers, caches, and what would run where
  check    a self-test on this machine, of a minute at most
  build    build the CPU kernels, which else the first call does
"""


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(HELP)
    assert "exit codes: 0 right; 1 a check failed" in printed


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "study"])
def test_help_of_a_command(name, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: fusedres {name} [-h] [--json]")
    assert cli.COMMANDS[name][1:] in printed.replace("\n", " ")
