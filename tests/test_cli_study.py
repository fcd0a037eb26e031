"""Studies and the demo from the command line, their bad arguments, and --out, which is tried before any work."""

from __future__ import annotations

import argparse
import json
import os
import sys
import types
from functools import partial

import command
import pytest
import study as small
import torch

from fusedres import cli, gradients
from fusedres.cli import folder, study
from fusedres.studies import demo, digits, shortcut, skip_scale, vanish
from fusedres.studies.report import Finding, Report
from fusedres.studies.values import MOST, NothingToMeasure

HAS_GPU = torch.cuda.is_available()


@pytest.fixture
def run(capsys):
    return partial(command.run, capsys)


def fake_study(holds=True):
    """A study that keeps to the protocol."""
    module = types.ModuleType("fusedres.studies.gate", "System B: what a gate does.\n\nMore of it.")

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--steps", type=int, default=4)
        parser.set_defaults(seeds=2)

    def run(options: argparse.Namespace, device: torch.device) -> Report:
        assert device == torch.device("cuda" if HAS_GPU else "cpu")
        data = {name: getattr(options, name) for name in ("steps", "seed", "seeds")} | {"lost": float("nan")}
        return Report("gate", "What does a gate do?", "a table", [Finding("it opens", "0.5", holds)], data)

    module.options, module.run = options, run
    return module


def work(*_, **__):
    raise AssertionError("work has begun")


def failing_study(error):
    module = fake_study()
    module.run = lambda options, device: (_ for _ in ()).throw(error)
    return module


@pytest.mark.parametrize("holds", [True, False])
def test_a_study_by_the_protocol(holds, run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fusedres.studies.gate", fake_study(holds))
    code, printed, err = run("study", "gate", "--steps", "7", "--out", tmp_path)
    assert (code, err) == (0 if holds else 1, "")
    said, summary = (
        ("holds", "1 of 1 claims hold, 0 do not, of which 0 known not to; none came out other than expected")
        if holds
        else ("DOES NOT HOLD", "0 of 1 claims hold, 1 do not, of which 0 known not to; 1 came out other than expected")
    )
    assert printed == (
        f"What does a gate do?\n\na table\n\n{said}: it opens\n    measured: 0.5\n{summary}\n\n"
        f"Written: {tmp_path / 'gate.json'}\n"
    )
    assert json.loads((tmp_path / "gate.json").read_text())["steps"] == 7

    code, out, err = run("study", "--json", "--seed", "3", "gate", "--out", tmp_path)
    found = json.loads(out)
    assert {name: found[name] for name in ("study", "steps", "seed", "seeds", "lost", "holds", "written")} == {
        "study": "gate",
        "steps": 4,
        "seed": 3,
        "seeds": 2,
        "lost": None,
        "holds": holds,
        "written": [str(tmp_path / "gate.json")],
    }
    assert run("study", "gate", "--steps", "x")[2] == "fusedres study: --steps must be of type int, got 'x'\n"


def test_what_a_study_lacks_is_said(run, monkeypatch, tmp_path):
    for error in (ImportError("the study needs sklearn: pip install fusedres[demo]"), NothingToMeasure("no draw")):
        monkeypatch.setitem(sys.modules, "fusedres.studies.gate", failing_study(error))
        assert run("study", "gate", "--out", tmp_path / "a" / "b") == (2, "", f"fusedres study: {error}\n")
        assert not (tmp_path / "a").exists()


def test_a_bug_in_a_study_is_no_bad_use(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fusedres.studies.gate", failing_study(ValueError("max() of nothing")))
    with pytest.raises(ValueError, match="of nothing"):
        run("study", "gate", "--out", tmp_path)


def test_memory_that_a_study_lacks_is_said(run, monkeypatch, tmp_path):
    lacking = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 4 bytes\nframe #0")
    monkeypatch.setitem(sys.modules, "fusedres.studies.gate", failing_study(lacking))
    code, out, err = run("study", "gate", "--out", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fusedres study: there is not enough memory for this: [enforce fail]")


def test_a_study_that_does_not_import_is_said(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "fusedres.studies.gate", None)
    code, out, err = run("study", "gate")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fusedres study: gate does not import: ")


def test_help_of_studies(capsys, monkeypatch, tmp_path):
    for name, module in study.STUDIES.items():
        (tmp_path / f"{module}.py").write_text(f'"""What {name} says.\n\nMore."""\nimport nothing_of_that_name\n')
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["study", "--help"])
    printed = capsys.readouterr().out
    assert "  lambda    What lambda says.\n" in printed
    assert "More" not in printed

    monkeypatch.setitem(sys.modules, "fusedres.studies.gate", fake_study())
    with pytest.raises(SystemExit):
        cli.main(["study", "--help", "gate"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: fusedres study gate [-h] [--json] [--out DIR]")
    assert "System B: what a gate does." in printed
    assert "--steps" in printed
    assert "[2]" in printed


@pytest.mark.parametrize("agrees", [True, False])
def test_demo_as_json(agrees, run, monkeypatch, tmp_path):
    def fake(out, epochs, seed, device):
        print("on the way")
        return {"agrees": agrees, "seed": seed, "losses": [float("nan")]}

    monkeypatch.setattr(demo, "run", fake)
    code, out, err = run("demo", "--json", "--seed", "2", "--out", tmp_path)
    assert (code, err) == (0 if agrees else 1, "on the way\n")
    assert json.loads(out) == {"agrees": agrees, "seed": 2, "losses": [None]}


# ------------------------------------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("gate --lr 0", "--lr must be above 0 and at most 1, got 0"),
        ("gate --lr nan", "--lr must be above 0 and at most 1, got nan"),
        ("gate --lr inf", "--lr must be above 0 and at most 1, got inf"),
        ("gate --lr x", "--lr must be a number, got 'x'"),
        ("gate --batch 5000", "--batch must be at most 1437, got 5000"),
        ("gate --seed 5000000000", "--seed must be at most 2147483647, got 5000000000"),
        ("depth --seeds 10001", "--seeds must be at most 10000, got 10001"),
        ("shortcut --sizes 4 1", "--sizes must be at least 3, an input, a hidden layer and an output, got 4 1"),
        ("shortcut --sizes 4,4,x", "--sizes must be an integer, got 'x'"),
        ("shortcut --sizes 4 4097 1", "--sizes must be at most 4096, got 4097"),
        ("lambda --depth 1100", "--depth must be at most 100, got 1100"),
        ("vanish --depth 1", "--depth must be at least 2, got 1"),
        ("vanish --width 1000000", "--width must be at most 1024, got 1000000"),
    ],
)
def test_bad_arguments_of_studies_are_said_in_one_line(arguments, said, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study._study(arguments.split()[0]), "run", work)
    assert run("study", *arguments.split()) == (2, "", f"fusedres study: {said}\n")


@pytest.mark.parametrize("sizes", [["8,4,2"], ["8", "4", "2"], ["8,4", "2"]])
def test_sizes_of_a_study_by_spaces_or_commas(sizes, run, monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(
        shortcut,
        "run",
        lambda options, device: (
            found.append(options.sizes) or fake_study().run(argparse.Namespace(steps=1, seed=0, seeds=1), device)
        ),
    )
    assert run("study", "shortcut", "--sizes", *sizes, "--out", tmp_path)[0] == 0
    assert found == [[8, 4, 2]]


@pytest.mark.usefixtures("engine")
def test_the_bounds_of_arguments_are_those_of_what_takes_them():
    assert len(digits.load(MOST + 10_000, torch.device("cpu")).images) == digits.TRAINED
    for scale in (0.5, 2.0):
        depth = skip_scale.DEEPEST
        carried = skip_scale.carried(scale, 0.0, depth, 8, 0, torch.device("cpu"))
        assert carried.coefficient[depth] == pytest.approx(scale**depth, rel=1e-5)


@pytest.mark.usefixtures("engine")
def test_draws_without_gradient_are_said():
    """Seed 6 saturates the last GELU."""
    with pytest.raises(NothingToMeasure, match=r"^no gradient passes in any draw of case 1, of 1: try more --seeds$"):
        small.run(vanish, "--seed", 6, "--seeds", 1, "--draws", 1, "--wide-seeds", 1)


@pytest.mark.usefixtures("engine")
def test_a_ratio_to_no_gradient_is_infinite():
    report = small.run(shortcut, "--sizes", *[1] * 60, "--steps", 1, "--seeds", 1)
    assert "inf times as much" in report.text()


# ------------------------------------------------------------------------------------------------ --out


@pytest.mark.parametrize("arguments", [["study", "gate"], ["compare", "--sizes", "3,3"], ["demo"]], ids=lambda a: a[0])
@pytest.mark.parametrize(
    ("place", "why"), [("file", "File exists"), ("file/below", "Not a directory"), ("full", "No space left on device")]
)
def test_out_is_tried_before_the_work(arguments, place, why, run, monkeypatch, tmp_path):
    monkeypatch.setitem(
        sys.modules, "fusedres.studies.gate", types.SimpleNamespace(run=work, options=lambda parser: None)
    )
    monkeypatch.setattr(demo, "run", work)
    monkeypatch.setattr(gradients, "compare_gradients", work)
    (tmp_path / "file").write_text("not a folder")
    if place == "full":
        monkeypatch.setattr(folder, "TemporaryFile", lambda dir: (_ for _ in ()).throw(OSError(28, why)))
    out = tmp_path / place
    said = f"fusedres {arguments[0]}: --out must be a folder to write into, got {out}: {why}\n"
    assert run(*arguments, "--out", out) == (2, "", said)
    assert os.listdir(tmp_path) == ["file"]


def test_a_study_is_written_before_its_text_is_printed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fusedres.studies.gate", fake_study())
    monkeypatch.setattr(Report, "text", lambda self: "more than a pipe holds " * 10_000)
    assert command.unread("study", "gate", "--out", tmp_path) == 141
    assert os.listdir(tmp_path) == ["gate.json"]


def test_what_cannot_be_written_at_the_end_is_printed_all_the_same(run, monkeypatch, tmp_path):
    def fails(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "fusedres.studies.gate", fake_study())
    monkeypatch.setattr(Report, "write", fails)
    monkeypatch.setattr(gradients.GradientComparison, "plot", fails)
    for arguments, printed in ((["study", "gate"], "holds: it opens"), (["compare"], "agree in 13 of 13 layers")):
        code, out, err = run(*arguments, "--out", tmp_path)
        assert (code, err) == (
            2,
            f"fusedres {arguments[0]}: --out cannot be written: [Errno 28] No space left on device\n",
        )
        assert printed in out
