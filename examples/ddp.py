"""Data parallel: every process has the whole network and a share of the rows; DDP sums their gradients.

    torchrun --nproc-per-node 2 examples/ddp.py --check

Gradients are sums over rows. One process that takes all rows at once adds them in another order, so that it differs by
roundings; one that takes the shares of two processes one after the other computes the same bits as they.
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
from torch.nn.parallel import DistributedDataParallel

from fusedres import FusedResidualStack


def built(device: torch.device) -> FusedResidualStack:
    torch.manual_seed(0)
    return FusedResidualStack([IN, *[WIDTH] * 6, OUT], last_activation="none").to(device)


def main() -> int:
    given = options(__doc__)
    with processes(given.timeout) as device:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        many = stepping(DistributedDataParallel(built(device)))
        one = stepping(built(device))
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
