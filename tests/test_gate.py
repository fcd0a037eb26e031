"""System B as a study: claims as inequalities, which fail where the gate or the skip is gone; norms that are exact."""

from __future__ import annotations

from argparse import Namespace
from functools import cache

import pytest
import study
import torch
import torch.nn.functional as F

from fusedres import Residual
from fusedres.studies import digits, gate

pytestmark = pytest.mark.usefixtures("engine")
SMALL = ("--seeds", 2, "--steps", 120, "--batch", 32, "--lr", 1e-2)


@cache
def _small_report():
    return study.run(gate, *SMALL)


@pytest.fixture
def report(engine):
    return _small_report()


def test_claims_hold(report, tmp_path):
    assert study.holds(report, "at the start", "leaves 0", "with a = 1", "are finite") == [True] * 4
    for one in report.data["gate"]:
        assert one["branch"][0] == one["gate"][0] == 0
        assert one["branch"][-1] > 0.1 * one["skip"][-1], "the branch's norm comes near the skip's"
    assert [len(one[name]) for one in report.data["gate"] for name in ("losses", "branch", "skip", "gate")] == [120] * 8
    assert report.data["none"][0]["gate"] == [1.0]
    assert report.data["none"][0]["losses"] != report.data["none"][1]["losses"]
    assert [path.name for path in report.write(tmp_path)] == ["gate.json", "gate.png"]
    assert (tmp_path / "gate.png").read_bytes().startswith(b"\x89PNG")
    assert "through the branch comes 0, 0 at step 1" in report.text()
    assert f"120 steps, {120 / (1437 // 32):.1f} epochs" in report.text()
    crossed = [one["crossing"] for one in report.data["gate"]]
    assert study.holds(report, "later the two cross") == [None not in crossed]


def test_a_gate_that_does_not_learn_is_noticed(monkeypatch):
    monkeypatch.setitem(gate.FORMS, "gate", {"branch_scale": 0.0})
    broken = study.run(gate, *SMALL, "--seeds", 1)
    assert study.holds(broken, "later the two cross, and", "comes to the size", "leaves 0") == [False] * 3


def test_a_skip_that_is_not_there_is_noticed(monkeypatch):
    monkeypatch.setitem(gate.FORMS, "gate", {"skip_scale": 0.0})
    monkeypatch.setitem(gate.FORMS, "none", {"skip_scale": 0.0})
    broken = study.run(gate, *SMALL, "--seeds", 1)
    assert study.holds(broken, "at the start", "with a = 1") == [False, False]


def test_a_gradient_that_is_not_finite_is_noticed(monkeypatch):
    smallest = gate.Training([1.0] * 60, [0.0] + [0.1] * 59, [1.0] * 60, [0.0] + [0.5] * 59, 0.9)
    options = Namespace(steps=60, lr=1e-2)
    for nan in ([], [7], [59]):
        branch = [float("nan") if i in nan else value for i, value in enumerate(smallest.branch)]
        spoilt = gate.Training(smallest.losses, branch, smallest.skip, smallest.gate, 0.9)
        findings = gate._claims({"gate": [smallest, spoilt], "none": [smallest, smallest]}, options, 1.0)
        assert findings[-1].holds == (not nan)
        assert findings[0].holds == (7 not in nan)


def test_norms_are_those_of_separate_views():
    """Against a sum written out, whose branch and skip are given an x each."""
    torch.manual_seed(0)
    residual = Residual(torch.nn.Conv2d(3, 3, 3, padding=1), branch_scale=0.5, learn_branch_scale=True, skip_scale=0.7)
    residual.double()
    given = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    with gate.watched(residual) as norms:
        residual(given * 1).sin().sum().backward()
    assert not residual.block._forward_pre_hooks
    x_in, x_res = (given.detach().clone().requires_grad_() for _ in range(2))
    (residual.branch_scale * residual.block(x_in) + 0.7 * x_res).sin().sum().backward()
    torch.testing.assert_close(norms.branch, [x_in.grad.norm()], rtol=1e-13, atol=0)
    torch.testing.assert_close(norms.skip, [x_res.grad.norm()], rtol=1e-13, atol=0)


@pytest.mark.parametrize("form", gate.FORMS)
def test_watching_changes_no_bit_of_the_training(form, monkeypatch):
    data = digits.load(0, torch.device("cpu"))
    options = Namespace(steps=5, batch=32, lr=1e-2)
    watched, plain = gate.build(form, 4, 0), gate.build(form, 4, 0)
    losses = gate.train(watched, data, options, 0).losses
    optimizer = torch.optim.Adam(plain.parameters(), options.lr)
    for step, rows in enumerate(gate._rows(len(data.images), options, 0, torch.device("cpu"))):
        loss = F.cross_entropy(plain(data.images[rows]), data.labels[rows])
        assert loss.item() == losses[step]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(map(torch.equal, watched.parameters(), plain.parameters()))


def test_forms_share_their_draws():
    gated, plain = gate.build("gate", 4, 3).state_dict(), gate.build("none", 4, 3).state_dict()
    assert gated.keys() - plain.keys() == {"9.branch_scale"}
    assert all(torch.equal(value, gated[name]) for name, value in plain.items())


def test_the_crossing_is_for_good():
    skip = [1.0] * 100
    assert gate.crossing([0.5] * 100, skip) is None
    assert gate.crossing([2.0] * 100, skip) == 1
    assert gate.crossing([0.0] * 20 + [2.0] * 80, skip) == 28  # 8 of 15 are above
    assert gate.crossing([0.0] * 43 + [2.0] * 57, skip) == 51
    assert gate.crossing([0.0] * 44 + [2.0] * 56, skip) is None, "49 steps are not yet for good"
    assert gate.crossing([0.0] * 44 + [2.0] * 56, skip, stays=49) == 52
    assert gate.crossing([0.0] * 20 + [2.0] * 60 + [0.0] * 20, skip) is None
    assert gate.crossing([2.0] * 3 + [float("nan")] * 97, skip) is None
    torch.testing.assert_close(gate.smooth([1.0, 2.0, 6.0], 2), torch.tensor([1.0, 1.5, 4.0], dtype=torch.float64))
