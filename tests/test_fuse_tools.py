"""A fused model in the hands of other tools: copies, files, compilers, transforms, checkpoints, threads."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from blocks import D, H, Written, agrees
from torch import nn
from torch.nn.utils import parametrize

import fusedres

pytestmark = pytest.mark.usefixtures("engine")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(D), nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> [..., D]."""
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


def pair():
    eager = nn.Sequential(Block(), Block())
    fused = copy.deepcopy(eager)
    fusedres.fuse_(fused)
    return fused, eager, torch.randn(5, D)


def is_fused(model, x):
    return len(fusedres.explain(model, x)) == 4


def test_state_dicts_go_both_ways():
    fused, eager, x = pair()
    other = nn.Sequential(Block(), Block())
    fused.load_state_dict(other.state_dict())
    agrees(fused, other, x)
    eager.load_state_dict(fused.state_dict())
    assert list(eager.state_dict()) == list(fused.state_dict())
    agrees(fused, eager, x)
    fused.load_state_dict({name: 2 * value for name, value in other.state_dict().items()}, assign=True)
    other.load_state_dict({name: 2 * value for name, value in other.state_dict().items()})
    agrees(fused, other, x)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fused_too_and_have_their_own_parameters(way, tmp_path):
    fused, eager, x = pair()
    fused(x)
    if way == "deepcopy":
        other = copy.deepcopy(fused)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(fused))
    else:
        torch.save(fused, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert is_fused(other, x)
    agrees(other, eager, x)
    with torch.no_grad():
        other[0].fc1.weight.zero_()
    agrees(fused, eager, x)
    fusedres.unfuse_(other)
    assert type(other[0]) is Block


def test_shallow_copies_and_replicas_compute_with_their_own_parameters():
    fused, eager, x = pair()
    fused(x)
    shallow = copy.copy(fused[0])
    torch.testing.assert_close(shallow(x), eager[0](x))
    replica = fused[0]._replicate_for_data_parallel()
    replica._modules = {name: part._replicate_for_data_parallel() for name, part in fused[0]._modules.items()}
    for name, part in replica._modules.items():
        part._parameters = {key: 2 * value.detach() for key, value in fused[0]._modules[name]._parameters.items()}
    doubled = copy.deepcopy(eager[0])
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(replica(x), doubled(x))


def test_signature_names_and_docstring_are_the_authors():
    fused, _, _ = pair()
    assert inspect.signature(fused[0].forward) == inspect.signature(Block().forward)
    assert type(fused[0]).__name__ == "Block"
    assert fused[0].forward.__doc__ == "x [..., D] -> [..., D]."
    assert repr(fused) == repr(pair()[1])


def test_functional_call_and_transforms():
    fused, eager, x = pair()
    values = {name: torch.randn_like(p) for name, p in fused.named_parameters()}
    ours = torch.func.functional_call(fused, values, (x,))
    torch.testing.assert_close(ours, torch.func.functional_call(eager, values, (x,)), rtol=1e-4, atol=1e-4)

    def loss(model):
        return lambda values, row: torch.func.functional_call(model, values, (row,)).square().sum()

    parameters = dict(eager.named_parameters())
    for transform in (
        torch.func.grad,
        lambda f: torch.func.vmap(torch.func.grad(f), (None, 0)),
        lambda f: torch.func.jacrev(f, 1),
    ):
        ours, theirs = (transform(loss(model))(parameters, x) for model in (fused, eager))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_double_backward():
    fused, eager, x = pair()

    def second(model):
        given = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(given).square().sum(), given, create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(model.parameters()), allow_unused=True)

    for ours, theirs in zip(second(fused), second(eager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    fused, _, x = pair()
    given = x.clone().requires_grad_()

    def gradients(call):
        return torch.autograd.grad(call(given).square().sum(), [given, *fused.parameters()])

    plain = gradients(fused)
    again = torch.utils.checkpoint.checkpoint(fused, given, use_reentrant=use_reentrant)
    again.square().sum().backward()
    for value, parameter in zip(plain, [given, *fused.parameters()], strict=True):
        assert torch.equal(value, parameter.grad)


@pytest.mark.parametrize("how", ["compile", "export", "jit.trace", "fx"])
def test_who_looks_at_a_forward_sees_the_authors(how):
    fused, eager, x = pair()
    fused(x)
    if how == "compile":
        fused.compile(fullgraph=True, backend="aot_eager")
        other = fused
    elif how == "export":
        rows = torch.export.Dim("rows", min=2)
        program = torch.export.export(fused.eval(), (x,), dynamic_shapes=({0: rows},))
        assert not any("fusedres" in str(node.target) for node in program.graph.nodes)
        other = program.module()
    elif how == "jit.trace":
        other = torch.jit.trace(fused, (x,))
    else:
        other = torch.fx.symbolic_trace(fused)
    agrees(other, eager, x)
    if how == "export":
        torch.testing.assert_close(other(torch.cat([x, x])), eager(torch.cat([x, x])))
    else:
        assert is_fused(fused, x)


def test_parametrized_and_pruned_after_fusing():
    fused, eager, x = pair()
    for model in (fused, eager):
        parametrize.register_parametrization(model[0].fc1, "weight", Half())
        model[1].fc2 = torch.nn.utils.parametrizations.weight_norm(model[1].fc2)
    agrees(fused, eager, x)
    parametrize.remove_parametrizations(fused[0].fc1, "weight")
    parametrize.remove_parametrizations(eager[0].fc1, "weight")
    agrees(fused, eager, x)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_another_class_over_a_fused_one():
    """As fully_shard and parametrize give; unfuse_ cannot look through it, and says so."""
    fused, eager, x = pair()
    author = type(fused[1])
    fused[1].__class__ = type("Sharded", (author,), {})
    agrees(fused, eager, x)
    classes = [type(module) for module in fused.modules()]
    for call in (fusedres.unfuse_, fusedres.fuse_):
        with pytest.raises(RuntimeError, match=r"Sharded was fused and has been given another class since, .*Sharded"):
            call(fused)
    assert [type(module) for module in fused.modules()] == classes  # nothing is half undone
    fused[1].__class__ = author
    fusedres.unfuse_(fused)
    assert type(fused[1]) is Block


def test_a_child_called_by_another_thread_in_the_midst_of_a_recording():
    seen, ones = [], torch.ones(1, D)

    def forward(m, x):
        seen.append(ThreadPoolExecutor(1).submit(m.norm, ones).result())
        return x + torch.relu(m.fc(x))

    model = Written(forward)
    expected = model.norm(ones)
    assert fusedres.fuse_(model).fused
    assert len(seen) >= 2  # one of each mode
    for one in seen:
        torch.testing.assert_close(one, expected)


def test_threads_call_while_another_records():
    """A kind of call that is new is recorded in the midst of others' calls."""
    model = Written(lambda m, x: x + m.number * torch.relu(m.fc(x)))
    fusedres.fuse_(model)
    x, wrong, stop = torch.randn(3, D), [], threading.Event()
    child = nn.Sequential(model.fc, nn.ReLU())

    def work():
        expected = child(x)
        while not stop.is_set():
            if not torch.equal(child(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(12):
        model.number = float(i)
        torch.testing.assert_close(model(x), x + i * torch.relu(model.fc(x)))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_after_too_many_kinds_of_calls_the_authors_forward_runs(launches):
    model = Written(lambda m, x: x + m.number * torch.relu(m.fc(x)))
    fusedres.fuse_(model)
    x = torch.randn(3, D)
    for i in [*range(80), 3]:
        model.number = float(i)
        launches.clear()
        torch.testing.assert_close(model(x), x + i * torch.relu(model.fc(x)))
        assert len(launches) == (i < 20) or 20 <= i < 40


def test_optimisers_and_ema_made_before_see_the_same_parameters():
    eager = nn.Sequential(Block(), Block())
    fused = copy.deepcopy(eager)
    runs = []
    for model in (fused, eager):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)
        average = torch.optim.swa_utils.AveragedModel(model)
        if model is fused:
            fusedres.fuse_(model)
        torch.manual_seed(7)
        for _ in range(5):
            model(torch.randn(6, D)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        runs.append([*model.state_dict().values(), *average.state_dict().values()])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_importing_fusedres_stays_light():
    code = "import sys, fusedres; print([m for m in ('torch._dynamo', 'torch.distributed.tensor') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert found.stdout.strip() == "[]", found.stderr
