"""Modules under DDP, FSDP2, FSDP2 with tensor parallelism, and in pipelines, run by torchrun: each against one process.

python -m torch.distributed.run --nproc-per-node 2 tests/fully_sharded.py OUT      what failed, by case, as JSON
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import sharded
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torchrun import run_cases

from fusedres import FusedResidualLinear, FusedResidualStack
from fusedres.parallel import FusedColwiseParallel, FusedRowwiseParallel, stages

ROWS, IN, OUT, STEPS = 24, 6, 3, 4
FULL = StateDictOptions(full_state_dict=True)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        FusedResidualLinear(IN, 8, skip="projection"),
        FusedResidualLinear(8, learn_branch_scale="channel"),  # FSDP2 takes no numbers, such as a learned skip_scale
        FusedResidualLinear(8, recompute=True),
        FusedResidualLinear(8, OUT, activation="none"),
    )


def stack(**options: object) -> FusedResidualStack:
    torch.manual_seed(0)
    return FusedResidualStack([IN, *[8] * 5, OUT], **options)


def scaled_stack() -> FusedResidualStack:
    return stack(learn_skip_scale=True, learn_branch_scale="channel")


def data() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [(torch.randn(ROWS, IN, generator=draw), torch.randn(ROWS, OUT, generator=draw)) for _ in range(STEPS)]


def trained(model: nn.Module, shares: int = 1, mine: int | None = None) -> list[float]:
    """Losses of each step; of so many shares of the rows all one after the other, or this process's alone."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for x, target in data():
        optimizer.zero_grad()
        parts = list(zip(x.chunk(shares), target.chunk(shares), strict=True))
        found = []
        for part, wanted in parts if mine is None else parts[mine : mine + 1]:
            found.append((model(part) - wanted).square().mean())
            found[-1].backward()
        if mine is None:
            for parameter in model.parameters():
                parameter.grad /= shares
        optimizer.step()
        losses.append(torch.stack(found).detach())
    return torch.stack(losses).tolist()


def same(many: Tensor, one: Tensor, ranks: int, name: str) -> None:
    """Two gradients have one sum; of more the order is the network's to choose."""
    many = many.full_tensor() if isinstance(many, DTensor) else many
    if ranks <= 2:
        assert torch.equal(many, one), name
    else:
        torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


def compare(many: nn.Module, made: Callable[[], nn.Module], mesh: DeviceMesh) -> None:
    """Losses of this process's rows, and all parameters after some steps."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    one = made()
    apart = torch.tensor(trained(one, ranks))[:, rank]
    own = torch.tensor(trained(many, ranks, rank))[:, 0]
    same(own, apart, ranks, "losses")
    for (name, parameter), wanted in zip(many.named_parameters(), one.parameters(), strict=True):
        same(parameter.detach(), wanted.detach(), ranks, name)


def divided(made: Callable[[], nn.Module], mesh: DeviceMesh, reshard: bool = True) -> nn.Module:
    model = made()
    for unit in model if isinstance(model, nn.Sequential) else ():
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def data_parallel(made: Callable[[], nn.Module], mesh: DeviceMesh) -> None:
    compare(DistributedDataParallel(made()), made, mesh)


def fully_sharded(made: Callable[[], nn.Module], reshard: bool, mesh: DeviceMesh) -> None:
    compare(divided(made, mesh, reshard), made, mesh)


def nothing_is_stale(made: Callable[[], nn.Module], mesh: DeviceMesh) -> None:
    """What a call computes is of the parameters as they are now, however they changed since the last call."""
    one, many = made(), divided(made, mesh)
    x = data()[0][0]
    assert torch.equal(many(x), one(x))
    with torch.no_grad():
        for parameter in (*one.parameters(), *many.parameters()):
            parameter.mul_(0.5)
        assert torch.equal(many(x), one(x)), "changed in place"
        torch.manual_seed(1)
        other = made()
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
        many.load_state_dict(divided_state(other, made, mesh))
        assert torch.equal(many(x), other(x)), "loaded"
    many(x).sum().backward()
    other(x).sum().backward()
    for (name, parameter), wanted in zip(many.named_parameters(), other.parameters(), strict=True):
        same(parameter.grad, wanted.grad, 1, f"d{name}")


def divided_state(other: nn.Module, made: Callable[[], nn.Module], mesh: DeviceMesh) -> dict[str, Tensor]:
    twin = made()
    twin.load_state_dict(other.state_dict())
    return divided(lambda: twin, mesh).state_dict()


def memory_is_let_go(mesh: DeviceMesh) -> None:
    """The network that a stack is bound to keeps none of the gathered parameters alive."""
    inner = stack()
    model = fully_shard(nn.Sequential(fully_shard(inner, mesh=mesh), nn.Linear(OUT, OUT)), mesh=mesh)
    model(data()[0][0]).sum().backward()
    held = inner._bound.network.parameters
    assert len(held) == len(list(inner.parameters()))
    assert mesh.size() == 1 or all(t.untyped_storage().size() == 0 for t in held)


def checkpoints(made: Callable[[], nn.Module], mesh: DeviceMesh) -> None:
    """One process's are many's, and the other way round, also where gathered parameters lie in the module."""
    one, many, other = made(), divided(made, mesh), divided(made, mesh)
    trained(many, mesh.size(), mesh.get_local_rank())
    x = data()[0][0]
    state = {name: t.full_tensor() for name, t in many.state_dict().items()}
    assert list(state) == list(one.state_dict())
    one.load_state_dict(state)
    assert torch.equal(many(x), one(x))
    other(x)
    other.load_state_dict(many.state_dict())
    assert torch.equal(other(x), one(x))


def torch_checkpoints(made: Callable[[], nn.Module], mesh: DeviceMesh) -> None:
    """By torch.distributed.checkpoint."""
    one, many, other = made(), divided(made, mesh), divided(made, mesh)
    trained(many, mesh.size(), mesh.get_local_rank())
    x = data()[0][0]
    if whole := get_model_state_dict(many, options=FULL):
        one.load_state_dict(whole)
    set_model_state_dict(other, get_model_state_dict(many))
    assert torch.equal(other(x), many(x))
    set_model_state_dict(divided(made, mesh), one.state_dict(), options=FULL)
    again = divided(made, mesh)
    again(x)
    set_model_state_dict(again, one.state_dict(), options=FULL)
    assert torch.equal(again(x), one(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(IN, 8)
        self.fc1 = FusedResidualLinear(8, 16, skip=None)
        self.fc2 = FusedResidualLinear(16, 8, activation="none")
        self.last = nn.Linear(8, OUT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.fc2(self.fc1(x), x))


def two_mesh_dimensions(mesh: DeviceMesh) -> None:
    """FSDP2 over one, tensor parallelism over the other: 2 × 2, or n × 1 and 1 × n."""
    n = mesh.size()
    for dp, tp in ((2, n // 2), (n, 1), (1, n)):
        grid = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
        many = parallelize_module(Block(), grid["tp"], {"fc1": FusedColwiseParallel(), "fc2": FusedRowwiseParallel()})
        for unit in (many.fc1, many.fc2):
            fully_shard(unit, mesh=grid["dp"])
        fully_shard(many, mesh=grid["dp"])
        one = Block()
        apart = torch.tensor(trained(one, dp))[:, grid["dp"].get_local_rank()]
        own = torch.tensor(trained(many, dp, grid["dp"].get_local_rank()))[:, 0]
        same(own, apart, n + 1, f"losses of {dp} x {tp}")
        for (name, parameter), wanted in zip(many.named_parameters(), one.parameters(), strict=True):
            same(parameter.detach(), wanted.detach(), n + 1, f"{name} of {dp} x {tp}")


def pipelined(made: Callable[[int], list[nn.Module]], schedule: type, mesh: DeviceMesh) -> None:
    """Stages in as many processes, against the same in one, micro-batch by micro-batch."""
    n, rank, micro = mesh.size(), mesh.get_local_rank(), 8
    mine, one = made(n)[rank], nn.Sequential(*made(n))
    steps = schedule(PipelineStage(mine, rank, n, torch.device("cpu")), micro, loss_fn=nn.functional.mse_loss)
    optimizer, losses = torch.optim.AdamW(mine.parameters(), 1e-2), []
    for x, target in data():
        found: list[Tensor] = []
        steps.step(*((x,) if rank == 0 else ()), **({"target": target, "losses": found} if rank == n - 1 else {}))
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in found])
    apart = trained(one, micro)
    assert rank < n - 1 or losses == apart
    for (name, parameter), wanted in zip(mine.named_parameters(), one[rank].parameters(), strict=True):
        assert torch.equal(parameter, wanted), name


def cut_layers(n: int) -> list[nn.Module]:
    """Chunks of an nn.Sequential of layers."""
    model = layers()
    return [model[4 * i // n : 4 * (i + 1) // n] for i in range(n)]


def cut_stack(n: int) -> list[nn.Module]:
    return list(stages(scaled_stack(), n))


MODELS: dict[str, Callable[[], nn.Module]] = {"layers": layers, "stack": stack, "scaled-stack": scaled_stack}
EVERY: dict[str, Callable[[DeviceMesh], None]] = {
    **{f"ddp-{name}": partial(data_parallel, made) for name, made in MODELS.items()},
    **{f"fsdp-{name}": partial(fully_sharded, made, True) for name, made in MODELS.items()},
    **{f"fsdp-{name}-kept-gathered": partial(fully_sharded, made, False) for name, made in MODELS.items()},
    **{f"not-stale-{name}": partial(nothing_is_stale, made) for name, made in MODELS.items()},
    **{f"checkpoint-{name}": partial(checkpoints, made) for name, made in MODELS.items()},
    **{f"torch-checkpoint-{name}": partial(torch_checkpoints, MODELS[name]) for name in ("layers", "stack")},
    "memory": memory_is_let_go,
    "fsdp-with-tensor-parallel": two_mesh_dimensions,
    "pipeline-layers": partial(pipelined, cut_layers, ScheduleGPipe),
    "pipeline-stack": partial(pipelined, cut_stack, ScheduleGPipe),
    "pipeline-stack-1f1b": partial(pipelined, cut_stack, Schedule1F1B),
}

if __name__ == "__main__":
    run_cases(sys.argv[1], sharded.EVERY | EVERY)
