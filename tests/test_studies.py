"""Studies: that they run, and that a claim which does not hold is said and fails."""

from __future__ import annotations

import json

import pytest
import torch

from fusedres import cli
from fusedres.studies import depth
from fusedres.studies.depth import Network, Training

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
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "depth.json").read_text())
    assert list(data["networks"]) == list(map(str, depth.NETWORKS))
    assert [len(one["losses"]) for one in data["networks"]["56 layers, plain"]] == [8, 8]
    assert data["networks"]["20 layers, plain"][0]["losses"] != data["networks"]["20 layers, plain"][1]["losses"]


def test_claims_follow_the_losses():
    def trained(losses):
        return {network: [Training([loss])] for network, loss in zip(depth.NETWORKS, losses, strict=True)}

    assert all(depth._claims(trained([0.05, 0.7, 0.05, 0.05, 0.05])).values())
    assert list(depth._claims(trained([0.05, 0.04, 0.05, 0.05, 2.0])).values()) == [False, False, False, False]
    assert not any(depth._claims(trained([float("nan")] * 5)).values())


def test_networks_of_a_study_start_alike_and_differ_in_skips():
    plain, residual = Network(3, False).build(0), Network(3, True).build(0)
    assert torch.equal(plain[1].layers[2][0].weight, residual[1].layers[2][0].weight)
    assert (plain[1].skips, residual[1].skips) == ([False] * 3, [True] * 3)
    assert (plain[1].layers[1][0].bias == 0).all()
    assert plain[1].layers[1][0].weight.std().item() == pytest.approx((2 / depth.WIDTH) ** 0.5, rel=0.1)


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["study", "width"])
    assert exit.value.code == 2
    assert "invalid choice: 'width'" in capsys.readouterr().err
