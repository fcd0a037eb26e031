"""What the scripts beside this one share: made-up data, where to run, a step of training, a comparison of losses.

torchrun --nproc-per-node 2 examples/ddp.py --check
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROWS, IN, WIDTH, OUT = 32, 16, 64, 4  # ROWS of all processes together
Batch = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor], Tensor]


def options(what: str, *more: tuple[str, dict]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--check", action="store_true", help="exit 1 if the losses are not those of one process")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for which a process waits for others")
    parser.add_argument("--die-at-step", type=int, default=-1, help="a process ends, to see what becomes of the others")
    parser.add_argument("--die-rank", type=int, default=1)
    parser.add_argument("--hang", action="store_true", help="it does not end, but stops")
    for name, settings in more:
        parser.add_argument(name, **settings)
    return parser.parse_args()


@contextmanager
def processes(timeout: float) -> Iterator[torch.device]:
    """This process's device, while it is one of those that torchrun started: CUDA and NCCL where each has a GPU."""
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= here
    device = torch.device("cuda", local) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if has_gpus else "gloo",
        timeout=timedelta(seconds=timeout),
        device_id=device if has_gpus else None,
    )
    try:
        yield device
    except RuntimeError as error:  # another process's end reaches this one as an error of what it waited for
        traceback.print_exc()
        print(f"rank {dist.get_rank()} ends: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        leave(1)
    dist.barrier()
    dist.destroy_process_group()


def leave(code: int) -> None:
    """Ends the process at once: with gloo, torch 2.13 aborts one in ten processes as their interpreter ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def batches(steps: int, device: torch.device) -> list[Batch]:
    """A function to learn: the same numbers in every process."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(IN, OUT, generator=draw)
    xs = [torch.randn(ROWS, IN, generator=draw) for _ in range(steps)]
    return [(x.to(device), torch.tanh(x @ mix).to(device)) for x in xs]


def share(batch: Batch, rank: int, ranks: int) -> Batch:
    """The rows of one process."""
    if ROWS % ranks:
        raise ValueError(f"{ROWS} rows are not to be shared among {ranks} processes")
    x, target = batch
    rows = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    return x[rows], target[rows]


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


def stepping(model: nn.Module, shares: int = 1) -> Step:
    """A step of training, which returns the loss; rows in so many shares, whose gradients are averaged."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def step(x: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        losses = []
        for part, wanted in zip(x.chunk(shares), target.chunk(shares), strict=True):
            losses.append(loss_of(model(part), wanted))
            losses[-1].backward()
        if shares > 1:
            for parameter in model.parameters():
                parameter.grad /= shares
        optimizer.step()
        return torch.stack(losses).sum().detach() / shares

    return step


def mean_over_processes(loss: Tensor) -> float:
    total = loss.clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def die(step: int, given: argparse.Namespace) -> None:
    if step == given.die_at_step and dist.get_rank() == given.die_rank:
        print(f"rank {given.die_rank} {'stops' if given.hang else 'dies'} at step {step}", file=sys.stderr, flush=True)
        while given.hang:
            time.sleep(1)
        os._exit(3)


def told(losses: list[float], alone: list[float], what: str, bound: float) -> int:
    """Prints the losses beside those of one process; 1 where one is off by more than bound, relative to the first."""
    apart = [abs(many - one) / alone[0] for many, one in zip(losses, alone, strict=True)]
    is_wrong = not all(one <= bound for one in apart)  # a NaN is no less
    worst = max(apart)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, and one {what}")
        for i, (many, one) in enumerate(zip(losses, alone, strict=True)):
            print(f"    step {i:3}    loss {many:.9f}    {one:.9f}")
        found = (
            "the same bits" if worst == 0 else f"apart by {worst:.1e} of the first loss at most, {bound:.0e} allowed"
        )
        print(f"    {'NOT THE SAME: ' if is_wrong else ''}{found}")
    return int(is_wrong)
