"""What readouts look like: the table, JSON lines, CSV and TensorBoard, letter by letter, and the pictures."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedres import FusedResidualStack
from fusedres.gradients import GradientProfile, Halves, InputGradient, Recorder, Statistics, pictures, table

GOLDEN = Path(__file__).parent / "golden"

WEIGHT = Statistics(6, 0.0125, 0.02, 0.05, 1 / 6, 0.0, {-7: 3, -5: 2})
BIAS = Statistics(3, 2.5e-9, 3e-9, 4e-9, 0.0, 1 / 3, {-29: 2})
INPUT = Statistics(12, 0.25, 0.5, 1.5, 0.0, 0.0, {-2: 10, 0: 2})
FIRST = GradientProfile(
    0.5,
    {"layers.0.0.weight": 0.0125, "head.weight": 0.0},
    ("layers.0", "layers.1"),
    ("layers.0",),
    True,
    {"layers.0.0.weight": WEIGHT, "layers.0.0.bias": BIAS, "head.weight": Statistics(4, 0.0, 0.0, 0.0, 1.0, 0.0, {})},
    {
        "layers.0": InputGradient(INPUT, Halves(0.75, 1.25, 0.5), 1.125),
        "layers.1": InputGradient(replace(INPUT, rms=0.125), Halves(0.0, 0.5, math.nan)),
        "output": InputGradient(replace(INPUT, rms=2.0)),
    },
    step=0,
)
SECOND = replace(FIRST, loss=None, step=10, mean_abs={"layers.0.0.weight": 0.01, "head.weight": math.inf})
BOTH = [FIRST, SECOND]


def same_as(name: str, text: str) -> None:
    assert text == (GOLDEN / name).read_text(), f"unlike tests/golden/{name}"


def test_table():
    same_as("table.txt", FIRST.table() + "\n")


def test_jsonl(tmp_path):
    table.write_jsonl(BOTH, tmp_path / "steps.jsonl")
    same_as("steps.jsonl", (tmp_path / "steps.jsonl").read_text())
    first, second = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())
    assert first["inputs"]["layers.1"]["halves"]["cosine"] is None  # which is no number, and JSON has none for it
    assert (first["step"], second["step"], second["loss"]) == (0, 10, None)


def test_csv(tmp_path):
    table.write_csv(BOTH, tmp_path / "steps.csv")
    same_as("steps.csv", (tmp_path / "steps.csv").read_text())


class Writer:
    """Has the methods of a SummaryWriter, and writes what they are given."""

    def __init__(self):
        self.lines = []

    def add_scalar(self, tag, value, step):
        self.lines.append(f"{step} {tag} {value:.6g}")

    def add_histogram_raw(self, tag, **facts):
        self.lines.append(f"{facts.pop('global_step')} {tag} {facts}")


def test_tensorboard():
    writer = Writer()
    table.write_tensorboard(BOTH, writer)
    same_as("tensorboard.txt", "\n".join(writer.lines) + "\n")


def test_a_recorder_writes_what_its_readouts_say(tmp_path):
    model = nn.Linear(3, 2)
    with Recorder(model, path=tmp_path / "all.jsonl") as recorder:
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
            recorder.step()
    recorder.to_jsonl(tmp_path / "kept.jsonl")
    recorder.to_csv(tmp_path / "kept.csv")
    assert (tmp_path / "all.jsonl").read_text() == (tmp_path / "kept.jsonl").read_text()
    assert recorder.to_dict()["records"] == list(map(json.loads, (tmp_path / "kept.jsonl").read_text().splitlines()))
    assert len((tmp_path / "kept.csv").read_text().splitlines()) == 1 + 3 * (2 + 1)
    writer = Writer()
    recorder.to_tensorboard(writer)
    assert sum(line.startswith("2 ") for line in writer.lines) == (6 + 1) * 3  # two parameters and the output


# ------------------------------------------------------------------------------------------------ pictures


@pytest.fixture
def recorded():
    model = FusedResidualStack([4] * 9 + [1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x = torch.randn(16, 4, requires_grad=True)
    with Recorder(model) as recorder:
        for _ in range(12):
            loss = (model(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            recorder.step(loss)
            optimizer.step()
    return recorder


def test_pictures_of_a_training(recorded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import raises: the user's backend stays the user's
    for name in ("depth", "heatmap", "halves"):
        getattr(recorded, f"plot_{name}")(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_axes_have_names(recorded, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(pictures.picture, "save", lambda figure, path: figures.append(figure))
    pictures.plot_depth(recorded.records, tmp_path)
    pictures.plot_halves(recorded.records, tmp_path)
    depth, halves = figures
    (axes,) = depth.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("weight, in the order of the model", "mean |∂L/∂W|")
    assert [line.get_label() for line in axes.lines if line.get_label().startswith("step")] == [
        f"step {step}" for step in (0, 3, 6, 8, 11)
    ]
    assert [axes.get_title() for axes in halves.axes] == [f"layers.{i}" for i in (0, 1, 3, 4, 6, 7)]
    shown = halves.axes[0].lines
    assert [line.get_label() for line in shown] == ["in all", "through the branch, dz W", "through the skip, λ ∂L/∂y"]
    assert len({line.get_linestyle() for line in shown} | {line.get_linewidth() for line in shown}) > 3
    first = recorded.records[0].inputs["layers.0"]
    assert [line.get_ydata()[0] for line in shown] == [first.statistics.norm, first.halves.branch, first.halves.skip]


def test_halves_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="no layer takes a skip"):
        pictures.plot_halves([replace(FIRST, inputs={})], tmp_path / "no.png")


def test_a_layer_whose_gradient_is_zero_has_a_place_in_every_picture(tmp_path):
    pictures.plot_heatmap([FIRST], tmp_path / "one-step.png")
    pictures.plot_heatmap(BOTH, tmp_path / "heatmap.png")
    pictures.plot_depth(BOTH, tmp_path / "depth.png")
    pictures.plot_halves(BOTH, tmp_path / "halves.png")
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))
