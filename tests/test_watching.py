"""How modules are watched: nothing is put into the graph, what comes back counts once, and nobody stays behind."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import FusedResidualLinear, FusedResidualStack, Residual, gradient_profile
from fusedres.gradients import Recorder, compare_gradients

both = pytest.mark.backends("triton", "cpu")


class Attends(nn.Module):
    """Takes its input three times."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Twice(nn.Module):
    """Owns a weight, and takes its input twice; given by its name."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, given):
        return given + torch.sin(given @ self.weight) * given.cos()


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), Twice()

    def forward(self, x):
        h = self.first(x)
        return h + self.second(given=h) + 0.5 * h.tanh()


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


WATCHED = {
    "attention": lambda: nn.Sequential(nn.Linear(8, 8), Residual(Attends()), Residual(Attends())),
    "encoder": lambda: nn.Sequential(encoder(), encoder()),
    "twice": Named,
    "sums": lambda: nn.Sequential(nn.Linear(8, 8), Residual(nn.Sequential(Twice(), nn.Linear(8, 8)))),
}


def made(name):
    torch.manual_seed(0)
    return WATCHED[name]()


def read(model, step):
    """What a step's record says of the inputs."""
    with Recorder(model) as recorder:
        step()
        recorder.step()
    return recorder.records[0].inputs


@pytest.mark.parametrize("name", WATCHED)
def test_not_a_bit_of_the_training_changes(name):
    def trained(recorder, model):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            x = torch.randn(4, 5, 8, requires_grad=True)
            model(x).square().mean().backward()
            if recorder:
                recorder.step()
            optimizer.step()
            optimizer.zero_grad()
        return [*model.parameters(), x.grad]

    alone, watched = made(name), made(name)
    with Recorder(watched) as recorder:
        found = trained(recorder, watched)
    assert all(torch.equal(a, b) for a, b in zip(found, trained(None, alone), strict=True))
    assert len(recorder.records[-1].inputs) > 2


def test_halves_of_an_input_that_its_block_takes_twice():
    model, x = made("twice"), torch.randn(3, 8)
    found = read(model, lambda: model(x).square().sum().backward())["second"]
    wide = copy.deepcopy(model).double()
    h = wide.first(x.double()).detach().requires_grad_()
    through, past = h.view_as(h), h.view_as(h)
    y = past + wide.second(through) + 0.5 * past.tanh()
    total, branch, skip = torch.autograd.grad(y.square().sum(), (h, through, past))
    assert found.statistics.norm == pytest.approx(total.norm().item(), rel=1e-5)
    assert found.halves.branch == pytest.approx(branch.norm().item(), rel=1e-5)
    assert found.halves.skip == pytest.approx(skip.norm().item(), rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_a_checkpoint_computes_again_counts_once(use_reentrant):
    blocks = nn.ModuleList(nn.Sequential(Residual(nn.Linear(8, 8)), nn.Linear(8, 8)) for _ in range(2))
    x = torch.randn(5, 8, requires_grad=True)

    def step(call):
        y = x
        for block in blocks:
            y = call(block, y)
        y.square().sum().backward()

    plain = read(blocks, lambda: step(lambda block, y: block(y)))
    again = read(blocks, lambda: step(lambda block, y: checkpoint(block, y, use_reentrant=use_reentrant)))
    assert list(again) == list(plain)
    for name, one in plain.items():
        assert again[name].statistics == one.statistics
        assert again[name].halves == one.halves


def test_a_tensor_that_enters_a_module_twice_counts_once():
    model, x = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), torch.randn(5, 8, requires_grad=True)

    def step():
        model[1](x)  # just to look
        h = model[0](x)
        h.retain_grad()
        (model[1](h) + 2 * model[1](h)).square().sum().backward()
        step.truth = h.grad.norm().item()

    found = read(model, step)["1"]
    assert found.statistics.count == 40
    assert found.statistics.norm == pytest.approx(step.truth, rel=1e-5)
    assert found.halves is None or found.halves.skip < 1e-5 * found.halves.branch


def test_forwards_without_a_backward_leave_one_hook_on_their_input():
    model, x = nn.Linear(8, 8), torch.randn(5, 8, requires_grad=True)
    with Recorder(model) as recorder:
        for _ in range(20):
            model(x)
        assert len(x._backward_hooks) == 1
        recorder.step()
        assert not x._backward_hooks


@both
@pytest.mark.parametrize("options", [{}, {"skip": "concat"}, {"order": "post"}, {"learn_skip_scale": True}], ids=str)
def test_autocast_of_a_float32_input_has_both_halves(options, backend, device):
    dtype = torch.bfloat16 if backend == "cpu" else torch.float16  # bfloat16 is wrong in the interpreter
    torch.manual_seed(0)
    layer, x = FusedResidualLinear(16, **options).to(device), torch.randn(9, 16, device=device, requires_grad=True)
    wide = copy.deepcopy(layer).double()

    def halves():
        with fusedres.eager():
            return read(wide, lambda: wide(x.double().detach().requires_grad_()).square().sum().backward())

    def step():
        with torch.autocast(torch.device(device).type, dtype):
            layer(x).float().square().sum().backward()

    (found, _), (expected, _) = read(layer, step).values(), halves().values()
    assert found.statistics.norm == pytest.approx(x.grad.norm().item(), rel=1e-3)
    assert found.halves == pytest.approx(expected.halves, rel=0.02)


TWICE = {
    "layers": lambda: nn.Sequential(*(FusedResidualLinear(8) for _ in range(2))),
    "stack": lambda: FusedResidualStack([8] * 3),
    "twin": lambda: FusedResidualStack([8] * 3).to_eager(),
}


@both
@pytest.mark.parametrize("name", TWICE)
def test_of_gradients_that_are_differentiated_again_nothing_is_said(name, device):
    """Not of that step's fused layers, since nobody sees all that comes to their inputs; of the next step all."""
    torch.manual_seed(0)
    model, x = TWICE[name]().to(device), torch.randn(5, 8, device=device, requires_grad=True)
    with Recorder(model) as recorder:
        (dx,) = torch.autograd.grad(1000 * model(x).sum(), x, create_graph=True)
        (dx.square().sum() + 1e-3 * model(x).square().sum()).backward()
        recorder.step()
        model(x).square().sum().backward()
        recorder.step()
    first, second = (one.inputs for one in recorder.records)
    assert set(first) <= {"output"}
    alone = read(model, lambda: model(x).square().sum().backward())
    assert {name: one.statistics.norm for name, one in second.items()} == pytest.approx(
        {name: one.statistics.norm for name, one in alone.items()}, rel=1e-5
    )


@pytest.mark.backends("cpu")
def test_a_layer_has_one_recorder_at_a_time(device):
    shared = FusedResidualLinear(8)
    one, other = nn.Sequential(shared, nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8), shared)
    x = torch.randn(3, 8, requires_grad=True)
    with Recorder(one) as recorder:
        with pytest.raises(RuntimeError, match="a layer of this model is being recorded already"):
            Recorder(other).__enter__()
        assert len(other[0]._forward_pre_hooks) == 0
        one(x).sum().backward()
        recorder.step()
    assert list(recorder.records[0].inputs) == ["0", "1", "output"]
    assert shared.watch == 0


@pytest.mark.backends("cpu")
def test_a_profile_inside_a_recorder_sets_it_aside(device):
    torch.manual_seed(0)
    model, x = nn.Sequential(FusedResidualLinear(8), nn.Linear(8, 8)), torch.randn(3, 8, requires_grad=True)
    twin = copy.deepcopy(model)

    def step(looks):
        with Recorder(model) as recorder:
            for _ in range(2):
                if looks:
                    assert gradient_profile(model, x).inputs["0"].statistics.count == 24
                    assert compare_gradients(model, twin, x).agrees
                model(x).square().sum().backward()
                recorder.step()
        return [{name: one.statistics for name, one in record.inputs.items()} for record in recorder.records]

    assert step(looks=True) == step(looks=False)


@pytest.mark.backends("cpu")
def test_copies_made_while_recording_are_not_recorded(device):
    model, x = nn.Sequential(FusedResidualLinear(8), nn.Linear(8, 8)), torch.randn(3, 8, requires_grad=True)
    with Recorder(model) as recorder:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert other[0].watch == 0
            other(x).sum().backward()
        model(x).sum().backward()
        recorder.step()
    assert {one.statistics.count for one in recorder.records[0].inputs.values()} == {24}
    other(x).sum().backward()
    assert not x._backward_hooks


def test_an_end_that_nobody_saw_gives_no_path():
    """The stack's own call is compiled, and what comes to its output is not seen there."""
    torch.manual_seed(0)
    stack, x = FusedResidualStack([8] * 4, skip_scale=0.5), torch.randn(3, 8, requires_grad=True)
    seen = read(stack, lambda: stack(x).sum().backward())
    assert all(seen[f"layers.{i}"].identity_path > 0 for i in range(3))
    compiled = copy.deepcopy(stack)
    compiled.compile(backend="aot_eager")
    found = read(compiled, lambda: compiled(x).sum().backward())
    assert all(
        found[f"layers.{i}"].identity_path in (None, pytest.approx(seen[f"layers.{i}"].identity_path)) for i in range(3)
    )


def test_batches_of_gradients_go_their_way():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(4, requires_grad=True)
    expected = torch.autograd.grad(model(x), x, torch.eye(4), is_grads_batched=True)[0]
    with Recorder(model):
        found = torch.autograd.grad(model(x), x, torch.eye(4), is_grads_batched=True)[0]
    assert torch.equal(found, expected)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    model = nn.Sequential(FusedResidualLinear(8), nn.Linear(8, 8))
    recorder = Recorder(model, path=tmp_path / "nowhere" / "steps.jsonl")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            recorder.__enter__()
    assert model[0].watch == 0
    assert not model[1]._forward_pre_hooks


def test_a_loss_of_several_numbers_is_refused_at_its_step():
    model = nn.Linear(2, 2)
    with (
        Recorder(model) as recorder,
        pytest.raises(ValueError, match=r"loss must be one number, got a tensor of shape"),
    ):
        recorder.step(torch.ones(3))


def test_parameters_that_were_replaced():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with Recorder(model) as recorder:
        for _ in range(2):
            model(torch.ones(3, 4)).sum().backward()
            recorder.step()
            model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    assert all(one.mean_abs["1.weight"] > 0 for one in recorder.records)


def test_parameters_that_do_not_lie_in_order():
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.randn(3, 2).T)
    with Recorder(model) as recorder:
        model(torch.ones(1, 3)).sum().backward()
        recorder.step()
    assert recorder.records[0].mean_abs["weight"] == 1.0


def test_where_no_number_is_finite_nothing_is_zero():
    model = nn.Linear(3, 2)
    with Recorder(model) as recorder:
        (model(torch.ones(1, 3)) * math.nan).sum().backward()
        recorder.step()
    (one,) = recorder.records
    found = one.parameters["weight"]
    assert (found.non_finite, one.mean_abs["weight"]) == (1.0, math.inf)
    assert all(math.isnan(value) for value in (found.mean_abs, found.rms, found.norm, found.max_abs))
    assert one.to_dict()["parameters"]["weight"]["mean_abs"] is None
    assert "100.0% not finite" in one.table()
