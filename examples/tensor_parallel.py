"""Tensor parallel: every process has some columns of every layer, and all rows.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py --check

A block is x + fc2(φ(fc1(x))): fc1 by output features, fc2 by input features, one sum over the processes forward and one
backward. A layer whose output is gathered (`gather`) needs one exchange each way, too. Sums over features, in as many
parts as there are processes, round otherwise than one process's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from together import IN, OUT, WIDTH, batches, die, leave, options, processes, stepping, told
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import parallelize_module

from fusedres import FusedResidualLinear
from fusedres.parallel import FusedColwiseParallel, FusedRowwiseParallel


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = FusedResidualLinear(width, hidden, skip=None)
        self.fc2 = FusedResidualLinear(hidden, width, activation="none")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x), x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, WIDTH)
        self.gather = FusedResidualLinear(WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, 4 * WIDTH) for _ in range(3)))
        self.last = nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.gather(self.first(x))))


def built(device: torch.device) -> Net:
    torch.manual_seed(0)
    return Net().to(device)


def main() -> int:
    given = options(__doc__)
    with processes(given.timeout) as device:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        plan = {
            "gather": FusedColwiseParallel(output_layouts=Replicate()),
            "blocks.*.fc1": FusedColwiseParallel(),
            "blocks.*.fc2": FusedRowwiseParallel(),
        }
        many, one = stepping(parallelize_module(built(device), mesh, plan)), stepping(built(device))
        losses, alone = [], []
        for i, batch in enumerate(batches(given.steps, device)):
            die(i, given)
            losses.append(many(*batch).item())
            alone.append(one(*batch).item())
        wrong = told(losses, alone, "that has all columns", bound=1e-5)
    return wrong if given.check else 0


if __name__ == "__main__":
    leave(main())
