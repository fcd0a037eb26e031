"""Readouts: what they say against plain .grad, and what they leave behind."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twins import twins

from fusedres import FusedResidualLinear, FusedResidualStack, gradient_profile
from fusedres.reference import ProjectionStack, ShapeGatedStack

CASE_1 = [3] * 13 + [1]
CASE_2 = [128, 256, 512, 1024, 512, 256, 128, 1]
SIZES_D = [128, 64, 32, 16, 8, 1]


# ------------------------------------------------------------------------------------------------ what is said


def test_profile_is_the_mean_of_what_backward_writes():
    model, by_hand = twins(ShapeGatedStack, ShapeGatedStack, CASE_1)
    profile = gradient_profile(model, torch.ones(3))

    loss = by_hand(torch.ones(3)).square().mean()
    loss.backward()
    expected = {name: p.grad.abs().mean().item() for name, p in by_hand.named_parameters() if name.endswith("weight")}
    assert profile.loss == loss.item()
    assert profile.mean_abs == pytest.approx(expected, rel=1e-6)  # which sum in another order
    assert list(profile.mean_abs) == [f"layers.{i}.0.weight" for i in range(13)]


def test_target_and_loss_fn():
    model, by_hand = twins(ShapeGatedStack, ShapeGatedStack, [4, 4, 3])
    x, values, labels = torch.randn(5, 4), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    for arguments, loss in (
        ((values,), F.mse_loss(by_hand(x), values)),
        ((labels, F.cross_entropy), F.cross_entropy(by_hand(x), labels)),
        ((None, torch.sum), by_hand(x).sum()),
    ):
        expected = torch.autograd.grad(loss, by_hand.layers[0][0].weight)[0].abs().mean().item()
        profile = gradient_profile(model, x, *arguments)
        assert profile.loss == loss.item()
        assert profile.mean_abs["layers.0.0.weight"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "x", "sentence"),
    [
        (ShapeGatedStack(CASE_1), torch.ones(3), "12 of 13 layers take a skip"),
        (ShapeGatedStack(CASE_1, False), torch.ones(3), "0 of 13 layers take a skip"),
        (ShapeGatedStack(CASE_2), torch.ones(128), "0 of 7 layers take a skip"),
        (ProjectionStack(SIZES_D), torch.randn(10, 128), "5 of 5 layers take a skip"),
        (ProjectionStack(SIZES_D, False), torch.randn(10, 128), "0 of 5 layers take a skip"),
        (
            nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
            torch.ones(3),
            "none of 2 layers says whether it takes a skip",
        ),
    ],
    ids=["A1", "A1-plain", "A2", "D", "D-plain", "no-layer-says"],
)
def test_the_table_says_how_many_layers_take_a_skip(model, x, sentence):
    profile = gradient_profile(model, x)
    assert profile.skips == sentence
    assert sentence in profile.table()
    assert profile.table().count("taken") == sum(
        name.startswith("layers") and name.removesuffix(".0.weight") in profile.skips_taken for name in profile.mean_abs
    )


def test_skips_of_fused_modules_are_the_resolved_ones():
    model = nn.Sequential(FusedResidualLinear(4, 6), FusedResidualLinear(6), nn.Linear(6, 2))
    profile = gradient_profile(model, torch.randn(2, 4))
    assert profile.layers == ("0", "1")
    assert profile.skips_taken == ("1",)
    assert list(profile.mean_abs) == ["0.weight", "1.weight", "2.weight"]

    alone = gradient_profile(FusedResidualLinear(4), torch.randn(2, 4))
    assert alone.skips_taken == ("model",)
    assert "taken" in alone.table()


def test_a_weight_that_the_loss_does_not_reach_counts_as_zero():
    model = nn.Sequential(nn.Linear(3, 3))
    model.add_module("unused", nn.Linear(3, 3))
    model.forward = model[0].forward
    assert gradient_profile(model, torch.ones(3)).mean_abs["unused.weight"] == 0.0


def test_only_trainable_floating_weights_of_two_dimensions_are_read():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert list(gradient_profile(model, torch.ones(3)).mean_abs) == ["2.weight"]


def test_a_mean_below_half_precision_is_not_lost():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    tiny = gradient_profile(model, torch.ones(64, dtype=torch.bfloat16), loss_fn=lambda y: (y * 1e-30).sum())
    assert tiny.mean_abs["weight"] == pytest.approx(1e-30, rel=1e-2)

    model = nn.Linear(2, 2, bias=False).half()
    x = torch.tensor([6e-8, 0.0], dtype=torch.float16)  # the smallest half, and a mean of half of it
    assert gradient_profile(model, x, loss_fn=torch.sum).mean_abs["weight"] == pytest.approx(3e-8, rel=1e-2)


# ------------------------------------------------------------------------------------------------ what is left behind


def test_the_model_is_left_as_it_was(device):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)).to(device)
    model[1].register_forward_hook(
        lambda module, inputs, output: setattr(module, "num_batches_tracked", torch.ones(()))
    )
    model[3].weight.grad = torch.full_like(model[3].weight, 7.0)
    model[2].eval()
    modes = [module.training for module in model.modules()]
    buffers = dict(model.named_buffers())
    versions = {name: buffer._version for name, buffer in buffers.items()}
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    x = torch.randn(6, 4, device=device, requires_grad=True)

    gradient_profile(model, x)

    assert x.grad is None
    assert [p.grad is None for p in model.parameters()] == [True, True, True, True, False, True]
    assert (model[3].weight.grad == 7.0).all()
    assert [module.training for module in model.modules()] == modes
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert {name: buffer._version for name, buffer in buffers.items()} == versions
    assert all(torch.equal(buffer, values[name]) for name, buffer in buffers.items())


def test_random_numbers_go_on_as_if_nothing_had_been_drawn(device):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2)).to(device)
    x = torch.randn(6, 4, device=device)

    def draws():
        return torch.cat([torch.rand(3), torch.rand(3, device=device).cpu()])

    torch.manual_seed(5)
    expected = draws()
    torch.manual_seed(5)
    first, second = gradient_profile(model, x), gradient_profile(model, x)
    assert torch.equal(draws(), expected)
    assert first == second  # the same dropout


def test_it_reads_where_gradients_are_switched_off():
    model, x = ShapeGatedStack([3, 3, 1]), torch.ones(3)
    expected = gradient_profile(model, x)
    with torch.no_grad():
        assert gradient_profile(model, x) == expected
    with torch.inference_mode():
        assert gradient_profile(model, x) == expected


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("model", [ShapeGatedStack(CASE_1), nn.Linear(3, 1)], ids=["stack", "one-weight"])
def test_pictures_are_written(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import raises: the user's backend stays the user's
    gradient_profile(model, torch.ones(3)).plot(tmp_path / "profile.png")
    nothing = gradient_profile(model, torch.ones(3), loss_fn=lambda y: (0 * y).sum())
    nothing.plot(str(tmp_path / "zeros.png"))
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("profile.png", "zeros.png"))


def test_zeros_and_infinities_are_marked_at_the_edges():
    from fusedres.gradients import picture

    axes = picture.new_figure(4, 3).subplots()
    values = {"0.weight": 1e-3, "1.weight": 0.0, "2.weight": math.inf, "3.weight": math.nan}
    picture.draw_gradients(axes, [picture.Series("model", values, picture.BLUE, "-", ".")])
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["model", "exactly 0 (at the foot)", "not finite (on top)"]
    marks = {line.get_marker(): list(line.get_xdata()) for line in axes.lines if len(line.get_xdata())}
    assert (marks["v"], marks["^"]) == ([1], [2, 3])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install fusedres\[demo\]"):
        gradient_profile(nn.Linear(3, 1), torch.ones(3)).plot(tmp_path / "picture.png")


# ------------------------------------------------------------------------------------------------ errors


LINEAR, ONES = nn.Linear(3, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((len, ONES), TypeError, "model must be a torch.nn.Module, got builtin_function_or_method"),
        ((LINEAR, [1.0]), TypeError, "x must be a tensor, got list"),
        ((LINEAR, ONES, None, "mse"), TypeError, "loss_fn must be callable, got str"),
        ((LINEAR, ONES, torch.ones(3)), ValueError, "target must be [2], the shape of the output, got [3]"),
        (
            (LINEAR, ONES, None, lambda y: y),
            ValueError,
            "loss_fn must return a single number, got a tensor of shape [2]",
        ),
        ((LINEAR, ONES, None, lambda y: 1.0), TypeError, "loss_fn must return a tensor, got float"),
        ((LINEAR, ONES, None, lambda y: y.detach().sum()), ValueError, "the loss depends on no trainable parameter"),
        ((nn.LayerNorm(3), ONES), ValueError, "LayerNorm has no trainable weight"),
        ((nn.Linear(3, 2).requires_grad_(False), ONES), ValueError, "Linear has no trainable weight"),
        ((nn.LSTMCell(3, 2), ONES), ValueError, "LSTMCell has no trainable weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_in_the_words_of_the_caller(arguments, error, message):
    with pytest.raises(error) as raised:
        gradient_profile(*arguments)
    assert message in str(raised.value)


def test_a_model_that_returns_no_tensor_needs_a_loss_fn():
    model = nn.Linear(3, 2)
    model.register_forward_hook(lambda module, inputs, output: (output,))
    with pytest.raises(TypeError, match="without a loss_fn the model must return a tensor, got tuple"):
        gradient_profile(model, ONES)
    gradient_profile(model, ONES, loss_fn=lambda output: output[0].sum())


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.usefixtures("engine")
def test_the_first_layer_of_a_network_is_there_where_x_requires_a_gradient(requires_grad):
    """A fused network computes what is asked for, and so nobody but a profile asks for the gradient of x."""
    fused = FusedResidualStack([4] * 4)
    x = torch.randn(5, 4, requires_grad=requires_grad)
    ours, theirs = gradient_profile(fused, x), gradient_profile(fused.to_eager(), x)
    layers = [*(["layers.0"] if requires_grad else []), "layers.1", "layers.2", "output"]
    assert list(ours.inputs) == list(theirs.inputs) == layers
    for layer in layers:
        assert ours.inputs[layer].statistics.norm == pytest.approx(theirs.inputs[layer].statistics.norm, rel=1e-4)
    assert x.grad is None
