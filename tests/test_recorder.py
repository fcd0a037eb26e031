"""Recording while training: that it changes nothing, costs no memory, and tells true values whatever the loop does."""

from __future__ import annotations

import copy
import gc
import math
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres import FusedResidualLinear, FusedResidualStack
from fusedres.gradients import Recorder, Statistics
from fusedres.recording import statistics

both = pytest.mark.backends("triton", "cpu")

MODELS = {
    "stack": lambda: FusedResidualStack([8] * 5 + [3], learn_skip_scale=True, drop_path=0.2),
    "projections": lambda: FusedResidualStack([8, 8, 5, 5, 3], skip="projection", order="post", activation="relu"),
    "layers": lambda: nn.Sequential(*(FusedResidualLinear(8, learn_branch_scale="channel") for _ in range(3))),
    "eager": lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)),
    "eager-twin": lambda: FusedResidualStack([8] * 4).to_eager(),
}


def made(name, device):
    torch.manual_seed(0)
    return MODELS[name]().to(device)


def trained(model, device, steps=4, recorder=None, wrap=lambda model: model):
    """Losses and parameters after some steps of Adam, recorded or not."""
    torch.manual_seed(1)
    optimizer, call = torch.optim.Adam(model.parameters(), 1e-2), wrap(model)
    losses = []
    for _ in range(steps):
        x = torch.randn(21, 8).to(device).requires_grad_()
        loss = call(x).square().mean()
        loss.backward()
        if recorder:
            recorder.step(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [p.detach() for p in model.parameters()], [b.detach() for b in model.buffers()]


def assert_same_bits(ours, theirs):
    assert ours[0] == theirs[0]
    assert all(torch.equal(a, b) for a, b in zip((*ours[1], *ours[2]), (*theirs[1], *theirs[2]), strict=True))


@both
@pytest.mark.launches_nothing  # of eager models
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_recording_changes_no_bit(name, every, device):
    expected = trained(made(name, device), device)
    model = made(name, device)
    with Recorder(model, every=every) as recorder:
        assert_same_bits(trained(model, device, recorder=recorder), expected)
    assert [one.step for one in recorder.records] == [0, 1, 2, 3][::every]
    assert [one.loss for one in recorder.records] == pytest.approx(expected[0][::every])


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("d", "M"), [(7, 300), (33, 4), (64, 200), (150, 300)], ids=["lanes", "dots", "blocks", "layers"]
)
@pytest.mark.parametrize("skip", ["identity", "projection", None])
def test_recording_changes_no_bit_of_any_way(d, M, skip, device):
    found = []
    for is_watched in (False, True):
        torch.manual_seed(0)
        stack, x = FusedResidualStack([d] * 4, skip=skip), torch.randn(M, d, requires_grad=True)
        recorder = Recorder(stack)
        if is_watched:
            recorder.__enter__()
        stack(x).square().sum().backward()
        if is_watched:
            recorder.step()
            recorder.__exit__(None, None, None)
            assert len(recorder.records[0].inputs) == 4
        found.append([x.grad, *(p.grad for p in stack.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("name", ["stack", "layers", "eager"])
def test_compiled_models(name, device):
    def compiled(model):
        return torch.compile(model, backend="aot_eager")

    expected = trained(made(name, device), device, wrap=compiled)
    model = made(name, device)
    outer = compiled(model)
    with Recorder(outer) as recorder:
        assert_same_bits(trained(model, device, recorder=recorder, wrap=lambda _: outer), expected)
    found = recorder.records[-1]
    assert not any(name.startswith("_orig_mod") for name in (*found.parameters, *found.inputs))
    # what runs inside is seen of fused layers alone
    count = {"stack": 5, "layers": 3, "eager": 0}[name]
    assert len([name for name in found.inputs if name != "output"]) == count
    assert all(one.mean_abs > 0 for name, one in found.parameters.items() if "weight" in name)


def gradients_of(model, x):
    """Every parameter's, by eager's name, from one backward of Σ y²."""
    model.zero_grad()
    model(x).square().sum().backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return model.by_layer(named) if isinstance(model, FusedResidualStack) else named


@both
def test_parameters_are_told_as_they_are(device):
    stack = FusedResidualStack([6, 6, 6, 4], learn_skip_scale=True, learn_branch_scale="channel").to(device)
    x = torch.randn(9, 6, device=device)
    expected = gradients_of(stack, x)
    with Recorder(stack) as recorder:
        stack(x).square().sum().backward()
        recorder.step()
    found = recorder.records[0].parameters
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        wide = gradient.double()
        assert found[name].count == wide.numel()
        assert found[name].mean_abs == pytest.approx(wide.abs().mean().item(), rel=1e-5)
        assert found[name].rms == pytest.approx(wide.square().mean().sqrt().item(), rel=1e-5)
        assert found[name].max_abs == pytest.approx(wide.abs().max().item(), rel=1e-6)


@both
def test_accumulated_gradients_count_all_rows(device):
    torch.manual_seed(0)
    stack, x = FusedResidualStack([6] * 4).to(device), torch.randn(20, 6, device=device, requires_grad=True)
    with Recorder(stack) as recorder:
        stack(x).square().sum().backward()
        recorder.step()
        stack.zero_grad()
        for part in x.split(5):
            stack(part).square().sum().backward()
        recorder.step()
    whole, parts = recorder.records
    for one, other in zip(whole.parameters.values(), parts.parameters.values(), strict=True):
        assert one.rms == pytest.approx(other.rms, rel=1e-4)
    for name, one in whole.inputs.items():
        other = parts.inputs[name]
        assert (one.statistics.count, one.statistics.max_abs) == (
            other.statistics.count,
            pytest.approx(other.statistics.max_abs, rel=1e-4),
        )
        assert one.statistics.norm == pytest.approx(other.statistics.norm, rel=1e-4)
        assert (one.halves is None) == (other.halves is None)
        if one.halves:
            assert one.halves == pytest.approx(other.halves, rel=1e-3, abs=1e-5)  # a cosine may be nearly 0


@both
@pytest.mark.parametrize("scale", [2.0**16, 1000.0])
def test_a_scaler_is_taken_out(scale, device):
    stack, x = FusedResidualStack([6] * 4).to(device), torch.randn(20, 6, device=device, requires_grad=True)
    scaler = torch.amp.GradScaler(device, init_scale=scale)
    optimizer = torch.optim.SGD(stack.parameters(), 0.0)
    records = []
    for one in (None, scaler):
        with Recorder(stack, scaler=one) as recorder:
            for _ in range(2):
                loss = stack(x).square().mean()
                (loss if one is None else one.scale(loss)).backward()
                recorder.step(loss)
                if one is not None:
                    one.step(optimizer)
                    one.update()
                optimizer.zero_grad()
        records.append(recorder.records[1])
    plain, scaled = records
    for name, statistics_ in plain.parameters.items():
        assert scaled.parameters[name].rms == pytest.approx(statistics_.rms, rel=1e-5)
    for name, found in plain.inputs.items():
        assert scaled.inputs[name].statistics.rms == pytest.approx(found.statistics.rms, rel=1e-5)
        if found.halves:
            assert scaled.inputs[name].halves == pytest.approx(found.halves, rel=1e-4)


@both
def test_a_scale_that_changes_from_step_to_step_is_taken_out(device):
    """As it is in the step's own backward: `update` comes after `recorder.step`."""
    stack, x = FusedResidualStack([6] * 4).to(device), torch.randn(20, 6, device=device, requires_grad=True)
    scaler = torch.amp.GradScaler(device, init_scale=4.0, growth_factor=8.0, growth_interval=1)
    optimizer = torch.optim.SGD(stack.parameters(), 0.0)
    with Recorder(stack, scaler=scaler) as recorder:
        for _ in range(3):
            scaler.scale(stack(x).square().mean()).backward()
            recorder.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert scaler.get_scale() == 4.0 * 8**3
    first, *others = recorder.records
    for one in others:
        for name, found in first.inputs.items():
            assert one.inputs[name].statistics.rms == pytest.approx(found.statistics.rms, rel=1e-5)
        for name, found in first.parameters.items():
            assert one.parameters[name].rms == pytest.approx(found.rms, rel=1e-5)


def test_a_scaler_that_found_an_infinity_is_seen():
    model = nn.Linear(4, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with Recorder(model, scaler=scaler) as recorder:
        scaler.scale((model(torch.ones(3, 4)) * 1e35).sum()).backward()
        recorder.step()
    found = recorder.records[0].parameters["weight"]
    assert found.non_finite == 1.0
    assert recorder.records[0].mean_abs["weight"] == math.inf


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("model", ["stack", "layers"])
def test_autocast(model, device):
    """In eager mode under autocast, too, what is told are the gradients there are."""
    model, x = made(model, device), torch.randn(21, 8, requires_grad=True)
    with Recorder(model.eval()) as recorder, torch.autocast("cpu", torch.bfloat16):
        model(x).square().mean().backward()
        recorder.step()
    found = recorder.records[0].inputs
    first = "layers.0" if "layers.0" in found else "0"
    assert found[first].statistics.norm == pytest.approx(x.grad.norm().item(), rel=0.01)
    assert found[first].halves is not None


@both
def test_frozen_parameters_are_not_there_and_unreached_ones_are_zero(device):
    stack = FusedResidualStack([6, 6, 6, 4]).to(device)
    stack.runs["0-1"].weight.requires_grad_(False)
    model = nn.ModuleDict({"used": stack, "unused": nn.Linear(3, 2)}).to(device)
    with Recorder(model) as recorder:
        stack(torch.randn(5, 6, device=device)).sum().backward()
        recorder.step()
    found = recorder.records[0].parameters
    assert "used.layers.0.0.weight" not in found
    assert found["used.layers.0.0.bias"].mean_abs > 0
    assert found["unused.weight"] == Statistics(6, 0.0, 0.0, 0.0, 1.0, 0.0, {})


def test_gradients_that_are_differentiated_again_are_none_of_a_steps():
    model, x = made("stack", "cpu"), torch.randn(5, 8, requires_grad=True)
    with Recorder(model) as recorder:
        (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        dx.square().sum().backward()
        recorder.step()
    assert all(math.isfinite(one.mean_abs) for one in recorder.records[0].parameters.values())


# ------------------------------------------------------------------------------------------------ for long


def resident():
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.slow
@pytest.mark.usefixtures("engine")  # and not the one that counts calls, whose list grows
def test_memory_does_not_grow(tmp_path):
    """Over 10 000 recorded steps: what is kept is spread over all of them, and all of them are in the file."""
    model = nn.Sequential(FusedResidualStack([4] * 3), nn.Linear(4, 2))
    x = torch.randn(3, 4, requires_grad=True)
    sizes = []
    with Recorder(model, keep=16, path=tmp_path / "steps.jsonl") as recorder:
        tracemalloc.start()
        for step in range(10_000):
            model(x).sum().backward()
            recorder.step()
            if step in (1000, 9_999):
                gc.collect()
                sizes.append((tracemalloc.get_traced_memory()[0], resident()))
        tracemalloc.stop()
        assert len(recorder._watch._handles) == 0
        assert not x._backward_hooks
    assert sizes[1][0] < sizes[0][0] + 50_000
    assert sizes[1][1] < sizes[0][1] + (16 << 20)
    steps = [one.step for one in recorder.records]
    assert 8 <= len(steps) <= 16
    assert set(map(int.__sub__, steps[1:], steps)) == {1024}
    assert (tmp_path / "steps.jsonl").read_bytes().count(b"\n") == 10_000


def test_what_is_kept_is_spread_over_the_training():
    model = nn.Linear(2, 2)
    with Recorder(model, keep=4, every=3) as recorder:
        for _ in range(40):
            model(torch.ones(1, 2)).sum().backward()
            recorder.step()
    assert [one.step for one in recorder.records] == [0, 12, 24, 36]


def test_a_recorder_goes_on_where_it_stopped():
    model = nn.Linear(2, 2)
    recorder = Recorder(model)
    for _ in range(2):
        with recorder:
            model(torch.ones(1, 2)).sum().backward()
            recorder.step()
    assert [one.step for one in recorder.records] == [0, 1]


@pytest.mark.backends("cpu")
def test_an_error_in_the_loop_leaves_nothing_behind(device):
    stack, other = made("stack", device), nn.Linear(8, 8)
    recorder = Recorder(nn.Sequential(other, stack))

    def stopped():
        with recorder:
            stack(other(torch.randn(3, 8))).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert (stack.watch, recorder.records) == (0, [])
    assert not other._forward_pre_hooks
    stack(other(torch.randn(3, 8))).sum().backward()


@pytest.mark.backends("cpu")
def test_two_recorders_of_one_model_each_have_their_own(device):
    stack, x = made("projections", device), torch.randn(5, 8, requires_grad=True)
    with Recorder(copy.deepcopy(stack)) as other, Recorder(stack) as recorder:
        stack(x).sum().backward()
        recorder.step()
        other.step()
    assert len(recorder.records[0].inputs) == 5
    assert other.records[0].inputs == {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((len,), TypeError, "model must be a torch.nn.Module, got builtin_function_or_method"),
        ((nn.Linear(2, 2), 0), ValueError, "every must be at least 1, got 0"),
        ((nn.Linear(2, 2), 1.5), TypeError, "every must be an int, got float"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        Recorder(*arguments)


def test_errors_of_options_and_of_use():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="keep must be at least 2, got 1"):
        Recorder(model, keep=1)
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler, got float"):
        Recorder(model, scaler=2.0)
    recorder = Recorder(model)
    with pytest.raises(RuntimeError, match=r"step\(\) is for inside the recorder's with block"):
        recorder.step()
    with recorder, pytest.raises(RuntimeError, match="this recorder is recording already"):
        recorder.__enter__()
    with pytest.raises(ValueError, match="there is nothing to draw before the first readout"):
        recorder.plot_depth("nowhere.png")


def test_sparse_gradients():
    model = nn.Embedding(10, 3, sparse=True)
    with Recorder(model) as recorder:
        F.mse_loss(model(torch.tensor([1, 1, 4])), torch.zeros(3, 3)).backward()
        recorder.step()
    found = recorder.records[0].parameters["weight"]
    dense = model.weight.grad.to_dense()
    assert (found.count, found.zero) == (30, pytest.approx(0.8))
    assert found.norm == pytest.approx(dense.norm().item(), rel=1e-5)
    assert statistics([dense], None, 1.0).shape == (1, 272)


def test_exported_names():
    assert fusedres.gradients.profile is fusedres.gradient_profile
