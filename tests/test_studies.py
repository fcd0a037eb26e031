"""Studies from the command line: that they run, and that a claim which does not hold is said and fails."""

from __future__ import annotations

import json

import pytest
import torch

from fusedres import cli
from fusedres.studies import depth

pytestmark = pytest.mark.usefixtures("engine")


@pytest.fixture
def one_thread_is_over():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread_is_over")
def test_the_depth_study_runs(tmp_path, capsys):
    arguments = ["study", "depth", "--steps", "8", "--seeds", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(arguments) == 1  # after 8 steps nothing is trained, and that is said
    printed = capsys.readouterr().out
    assert "DOES NOT HOLD: 1000 layers can be trained with skips" in printed
    assert "1000 layers, residual" in printed
    for picture in ("depth.png", "depth-lesion.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "depth.json").read_text())
    assert list(data["networks"]) == list(map(str, depth.NETWORKS))
    assert [len(one["losses"]) for one in data["networks"]["56 layers, plain"]] == [8, 8]
    assert data["networks"]["20 layers, plain"][0]["losses"] != data["networks"]["20 layers, plain"][1]["losses"]
    assert len(data["networks"]["1000 layers, plain"]) == 1


@pytest.mark.usefixtures("one_thread_is_over")
def test_a_study_that_holds(tmp_path, capsys):
    arguments = ["study", "vanish", "--wide-seeds", "1", "--draws", "40", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "DOES NOT HOLD" not in capsys.readouterr().out
    assert json.loads((tmp_path / "vanish.json").read_text())["holds"] is True


def test_wrong_arguments(capsys):
    for arguments, told in (
        (["study", "width"], "must be one of vanish, gate, lambda, shortcut, depth, got 'width'"),
        (["study", "vanish", "--depth", "1"], "--depth must be at least 2, got 1"),
    ):
        assert cli.main(arguments) == 2
        assert told in capsys.readouterr().err
