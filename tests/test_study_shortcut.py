"""System D as a study: its claims as inequalities, which fail where projections are not taken; equal budgets."""

from __future__ import annotations

from functools import cache

import pytest
import study
import torch

from fusedres import FusedResidualLinear, FusedResidualStack, reference
from fusedres.studies import shortcut

pytestmark = pytest.mark.usefixtures("engine")
SMALL = ("--seeds", 2, "--steps", 80)


@cache
def _small_report():
    return study.run(shortcut, *SMALL)


@pytest.fixture
def report(engine):
    return _small_report()


def test_claims_hold(report, tmp_path):
    assert study.holds(report) == [True] * 6
    assert "identity: 0 of 5 layers take it; projection: 5 of 5" in report.text()
    assert [path.name for path in report.write(tmp_path)] == ["shortcut.json", "shortcut.png"]
    for with_projections, without in zip(
        *(report.data["as_written"][name] for name in ("projection", "none")), strict=True
    ):
        assert len(with_projections) == 10
        assert all(with_projections[f"layers.{i}.0.weight"] > 3 * without[f"layers.{i}.0.weight"] for i in range(4))


def test_projections_that_are_not_taken_are_noticed(report, monkeypatch):
    monkeypatch.setitem(shortcut.SKIPS, "projection", None)
    broken = study.run(shortcut, *SMALL, "--seeds", 1)
    assert study.holds(broken, "a learned Linear", "first layer's weight", "closer together") == [False] * 3


def test_dense_layers_that_are_not_are_noticed(monkeypatch):
    build = shortcut.build
    monkeypatch.setattr(shortcut, "build", lambda name, *sizes: build("none" if name == "dense" else name, *sizes))
    assert study.holds(study.run(shortcut, *SMALL, "--seeds", 1), "concatenation") == [False]


def test_fused_gradients_that_are_not_eagers_are_noticed(monkeypatch):
    """A twin of other weights."""
    monkeypatch.setattr(reference.ProjectionStack, "load_state_dict", lambda *_: None)
    assert study.holds(study.run(shortcut, *SMALL, "--seeds", 1), "agree with eager") == [False]


def test_a_loss_that_is_not_finite_is_noticed(monkeypatch):
    monkeypatch.setattr(shortcut, "LEARNING_RATE", 1e30)
    assert study.holds(study.run(shortcut, *SMALL, "--seeds", 1), "are finite") == [False]


@pytest.mark.parametrize("name", shortcut.SHORTCUTS)
def test_budgets_are_equal(report, name):
    widths = report.data["widths"][name]
    model = shortcut.build(name, widths, 0)
    assert report.data["parameters"][name] == shortcut.count(model)
    assert shortcut.count(model) == pytest.approx(report.data["budget"], rel=0.01)
    assert (widths[0], widths[-1], len(widths)) == (128, 1, 6)
    assert (len(set(widths[1:-1])) == 1) == (name in ("identity", "none, even"))
    assert shortcut.fit(name, (20, 9, 5, 2), 700) == shortcut.fit(name, (20, 9, 5, 2), 701)


def test_networks_are_what_they_are_called():
    x = torch.randn(3, 6)
    projected = shortcut.build("projection", (6, 4, 2), 0, "same")
    eager = reference.ProjectionStack([6, 4, 2])
    eager.load_state_dict(projected.state_dict())
    torch.testing.assert_close(projected(x), eager(x))
    dense = shortcut.build("dense", (6, 4, 3, 2), 0)
    assert [one.in_features for one in dense] == [6, 10, 13]
    h = torch.cat([x, torch.nn.functional.gelu(x @ dense[0].weight.T + dense[0].bias)], -1)
    torch.testing.assert_close(dense[0](x), h)
    assert isinstance(shortcut.build("identity", (6, 4, 4, 2), 0), FusedResidualStack)
    assert shortcut.build("identity", (6, 4, 4, 2), 0).skips == [False, True, False]
    assert isinstance(dense[2], FusedResidualLinear)


def test_every_shortcut_learns_the_same_function(report):
    losses = {name: [one["losses"] for one in runs] for name, runs in report.data["equal_budgets"].items()}
    assert all(one[-1] < 0.8 * one[0] for runs in losses.values() for one in runs)
    assert len({len(one) for runs in losses.values() for one in runs}) == 1
    x = torch.randn(1000, 8)
    y = shortcut.teacher(x, 0)
    assert y.shape == (1000, 1)
    assert torch.equal(y, shortcut.teacher(x, 0))
    assert not torch.equal(y, shortcut.teacher(x, 1))
    assert y.square().mean().item() == pytest.approx(1.5, abs=0.4)
