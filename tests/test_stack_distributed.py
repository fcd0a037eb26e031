"""A stack under DistributedDataParallel: two processes with gloo train as one does."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from fusedres import FusedResidualStack

STEPS, ROWS, SIZES = 5, 8, [6, 6, 6, 6, 3]


def trained(stack, batches, model=None):
    """Losses of each step, on this process's batches."""
    model = stack if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for x, target in batches:
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def data(seed=5):
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(2 * ROWS, SIZES[0], generator=draw), torch.randn(2 * ROWS, SIZES[-1], generator=draw))
        for _ in range(STEPS)
    ]


def built():
    torch.manual_seed(0)
    return FusedResidualStack(SIZES, learn_skip_scale=True)


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        stack = built()
        mine = [tuple(t[rank * ROWS : (rank + 1) * ROWS] for t in batch) for batch in data()]
        losses = trained(stack, mine, DistributedDataParallel(stack))
        torch.save((losses, stack.state_dict()), f"{folder}/{rank}")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.usefixtures("engine")
def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    (losses, state), (other_losses, other_state) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    stack = built()
    alone = trained(stack, data())
    assert [(a + b) / 2 for a, b in zip(losses, other_losses, strict=True)] == pytest.approx(alone, rel=1e-5)
    for name, value in stack.state_dict().items():
        assert torch.equal(state[name], other_state[name])
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
