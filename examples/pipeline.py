"""Pipeline: every process has some layers of a deep stack, and passes micro-batches on.

    torchrun --nproc-per-node 2 examples/pipeline.py --check --schedule 1f1b

One process that runs the same stages on the same micro-batches computes the same bits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from together import IN, OUT, WIDTH, Step, batches, die, leave, loss_of, options, processes, told
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from fusedres import FusedResidualStack
from fusedres.parallel import stages

MICRO = 8  # micro-batches of a batch: as many as stages, at least
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


def built(device: torch.device, n: int) -> list[FusedResidualStack]:
    torch.manual_seed(0)
    stack = FusedResidualStack([IN, *[WIDTH] * 10, OUT], last_activation="none").to(device)
    return stages(stack, n)


def piped(stage: FusedResidualStack, rank: int, ranks: int, device: torch.device, kind: str) -> Step:
    """A step of this process's stage; the loss, which the last one knows, is told to all."""
    schedule = SCHEDULES[kind](PipelineStage(stage, rank, ranks, device), MICRO, loss_fn=loss_of)
    optimizer = torch.optim.AdamW(stage.parameters(), 1e-2)

    def step(x: Tensor, target: Tensor) -> Tensor:
        losses: list[Tensor] = []
        inputs = (x,) if rank == 0 else ()
        wanted = {"target": target, "losses": losses} if rank == ranks - 1 else {}
        schedule.step(*inputs, **wanted)
        optimizer.step()
        optimizer.zero_grad()
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros((), device=device)
        dist.broadcast(loss, ranks - 1)
        return loss

    return step


def alone(model: nn.Module) -> Step:
    """The same step in one process: micro-batch after micro-batch, their gradients summed."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def step(x: Tensor, target: Tensor) -> Tensor:
        losses = []
        for part in zip(x.chunk(MICRO), target.chunk(MICRO), strict=True):
            losses.append(loss_of(model(part[0]), part[1]))
            losses[-1].backward()
        for parameter in model.parameters():
            parameter.grad /= MICRO  # as the schedule does, after the last micro-batch
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().detach()

    return step


def main() -> int:
    given = options(__doc__, ("--schedule", {"choices": list(SCHEDULES), "default": "gpipe"}))
    with processes(given.timeout) as device:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        many = piped(built(device, ranks)[rank], rank, ranks, device, given.schedule)
        one = alone(nn.Sequential(*built(device, ranks)))
        losses, apart = [], []
        for i, batch in enumerate(batches(given.steps, device)):
            die(i, given)
            losses.append(many(*batch).item())
            apart.append(one(*batch).item())
        wrong = told(losses, apart, "that runs the same stages", bound=0.0)
    return wrong if given.check else 0


if __name__ == "__main__":
    leave(main())
