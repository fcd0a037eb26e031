"""Fully sharded: every process keeps a part of every parameter, and gathers them layer by layer as it needs them.

    torchrun --nproc-per-node 2 examples/fsdp.py --check

A layer by itself is a unit, and so is a stack: gathered before its call, let go after it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from together import (
    IN,
    OUT,
    WIDTH,
    batches,
    die,
    leave,
    mean_over_processes,
    options,
    processes,
    share,
    stepping,
    told,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fusedres import FusedResidualLinear, FusedResidualStack


def built(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [FusedResidualLinear(IN, WIDTH), *(FusedResidualLinear(WIDTH) for _ in range(3))]
    return nn.Sequential(*layers, FusedResidualStack([WIDTH] * 4 + [OUT], last_activation="none")).to(device)


def main() -> int:
    given = options(__doc__)
    with processes(given.timeout) as device:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh(device.type, (ranks,))
        model = built(device)
        for unit in model:
            fully_shard(unit, mesh=mesh)
        many, one = stepping(fully_shard(model, mesh=mesh)), stepping(built(device))
        apart = stepping(built(device), shares=ranks)
        losses, alone, shared = [], [], []
        for i, batch in enumerate(batches(given.steps, device)):
            die(i, given)
            losses.append(mean_over_processes(many(*share(batch, rank, ranks))))
            alone.append(one(*batch).item())
            shared.append(apart(*batch).item())
        wrong = told(losses, alone, "that takes all rows at once", bound=1e-5)
        # a sum of two has one order; of more it is the network's to choose
        wrong += told(losses, shared, "that takes the shares one by one", bound=0.0 if ranks <= 2 else 1e-5)
    return min(wrong, 1) if given.check else 0


if __name__ == "__main__":
    leave(main())
