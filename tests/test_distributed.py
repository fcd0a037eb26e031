"""The examples of training on 1, 2 and 4 processes, run by torchrun; and what becomes of them where one dies."""

from __future__ import annotations

import importlib.util
import re
import time

import pytest
import torch.distributed
from torchrun import ROOT, torchrun

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.usefixtures("engine"),
]

EXAMPLES = {  # and how often they find the bits of one process
    ("fsdp", 1): 2,
    ("ddp", 2): 1,
    ("ddp", 4): 0,
    ("fsdp", 2): 1,
    ("fsdp", 4): 0,
    ("tensor_parallel", 2): 0,
    ("tensor_parallel", 4): 0,
    ("pipeline", 2): 1,
    ("pipeline", 4): 1,
}
MORE = {("pipeline", 4): ("--schedule", "1f1b")}


@pytest.mark.parametrize(("example", "processes"), EXAMPLES)
def test_an_example_agrees_with_one_process(example, processes):
    run = torchrun(processes, f"examples/{example}.py", "--check", "--steps", 5, *MORE.get((example, processes), ()))
    assert run.returncode == 0, run.stdout + run.stderr
    losses = [tuple(map(float, pair)) for pair in re.findall(r"loss (\d\S*) +(\d\S*)", run.stdout)]
    comparisons = run.stdout.count(f"{processes} processes, and one that")
    assert len(losses) == 5 * comparisons
    assert losses[4][0] < 0.9 * losses[0][0]  # it trains
    assert run.stdout.count("the same bits") >= EXAMPLES[example, processes]
    assert "NOT THE SAME" not in run.stdout


@pytest.fixture
def together(monkeypatch):
    """What the examples share, as in the first of two processes."""
    spec = importlib.util.spec_from_file_location("together", ROOT / "examples/together.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    return module


@pytest.mark.parametrize("wrong", [0.5001, float("nan"), float("inf")])
def test_other_losses_are_told(wrong, together, capsys):
    assert together.told([1.0, 0.5], [1.0, 0.5], "of a kind", 0.0) == 0
    assert "the same bits" in capsys.readouterr().out
    assert together.told([1.0, wrong], [1.0, 0.5], "of a kind", 1e-5) == 1
    assert "NOT THE SAME" in capsys.readouterr().out
    assert together.told([1.0, 0.5 + 1e-7], [1.0, 0.5], "of a kind", 0.0) == 1


def test_rows_that_cannot_be_shared_are_refused(together):
    with pytest.raises(ValueError, match="32 rows are not to be shared among 3 processes"):
        together.share(together.batches(1, torch.device("cpu"))[0], 0, 3)


# ---------------------------------------------------------------------------------------------- faults

BOUND = 60  # seconds, for a start of some and an end at once


@pytest.mark.parametrize(
    ("example", "processes", "rank"),
    [("ddp", 2, 1), ("ddp", 4, 2), ("fsdp", 2, 1), ("tensor_parallel", 2, 1), ("pipeline", 2, 1)],
)
def test_the_others_end_where_one_dies(example, processes, rank):
    began = time.monotonic()
    run = torchrun(processes, f"examples/{example}.py", "--die-at-step", 2, "--die-rank", rank)
    assert time.monotonic() - began < BOUND
    assert run.returncode != 0
    assert f"rank {rank} dies at step 2" in run.stderr
    assert f"examples/{example}.py FAILED" in run.stderr
    assert re.search(rf"rank +: {rank} .*\n +exitcode +: 3 ", run.stderr), run.stderr[-3000:]
    others = "|".join(str(i) for i in range(processes) if i != rank)
    # it says what it met, unless torchrun was there first
    assert re.search(rf"rank ({others}) ends: \w*Error: ", run.stderr) or "SIGTERM" in run.stderr, run.stderr[-3000:]
    assert "processes, and one" not in run.stdout  # nothing is reported as done


def test_the_others_do_not_wait_for_one_that_stops():
    began = time.monotonic()
    run = torchrun(2, "examples/ddp.py", "--die-at-step", 2, "--hang", "--timeout", 5)
    assert time.monotonic() - began < BOUND
    assert run.returncode != 0
    assert "rank 1 stops at step 2" in run.stderr
    assert re.search(r"rank 0 ends: \w*Error: .*[Tt]imed out", run.stderr), run.stderr[-3000:]
