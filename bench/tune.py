"""Which kernels run a layer fastest on this GPU: fusedres/tiles/<gpu>.json, which dispatch reads.

    python bench/tune.py --budget-s 90 --out FILE                   bf16, widths in order of worth, many rows and few
    python bench/tune.py --again --widths 512 --mode fp16 bf16      these once more, the file's others kept
    python bench/tune.py --dry                                      the same in the interpreter, to see that it works

Each candidate (bench/candidates.py) is first compiled and compared with float64 on integers, on a layer that asks much
of its kernel; one that spills, is wrong or does not run is left out, and the file says why. The others of a part of the
plan take turns, the second-level cache flushed before each call. The least median wins, but the heuristic's own form
stays unless the winner's upper quartile is below its lower one. A narrow layer's one kernel contends with the best of
the pieces as a step of training, forward and backward, since forward keeps nothing for it. At last the whole layer
contends with eager PyTorch, as a call and as a step, in wall time of calls in a row, the host's part included: where
eager is faster beyond noise it will be taken. What is committed is then compared, option by option, by
bench/exact.py and bench/lens.py. Exits with 1 where a candidate is wrong, or a layer has no form left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from examine import HAS_GPU, Job, Subject, Workers, multiply_as  # before triton, which timing asks for its version

# isort: split
import torch
from candidates import MOST, InPieces, candidates, label
from clock import Cuda, Host
from configurations import MODES
from exact import capability
from timing import Quartiles, in_turns, machine, sources

from fusedres import dispatch, measured, plans
from fusedres.kernels.config import Plan, Together

SIZES = [(width, width) for width in (512, 256, 1024, 128, 64, 2048, 4096, 8192)]  # N and K, in order of worth
SAME = ("gpu", "torch", "triton", "ptxas", "driver", "sources")  # facts without which a row is measured again

# ---------------------------------------------------------------------------------------------- one layer


class Queued(Cuda):
    """The host is ahead of the device when a call begins, so that a call of many launches has no gaps."""

    def flush(self) -> None:
        for _ in range(4):
            super().flush()


PARTS = ("forward", "training", "backward", "weight")
STEPS = {"together": ("forward", "together"), "pieces": ("training", "backward", "weight")}  # of training
Times = dict[str, Quartiles]
Timer = Callable[[dict[str, Callable[[], Any]]], Times]


class Timers(NamedTuple):
    """Of calls that take turns: cold device time of a part, wall time of whole layers in a row."""

    parts: Timer
    layers: Timer


def timers(is_dry: bool) -> Timers:
    """In 7 to 30 rounds; dry, one round by the host's clock."""
    if is_dry:
        dry = partial(in_turns, fill_s=0.0, least=1, most=1, long_s=0.0, run=Host().views()["host"].run)
        return Timers(dry, dry)
    rounds = partial(in_turns, budget_s=0.8, least=7, most=30, long_s=0.0)
    cold, host = Queued().views()["cold"], Queued().views()["host"]
    return Timers(partial(rounds, fill_s=0.0, run=cold.run), partial(rounds, fill_s=host.fill_s, run=host.run))


def winner(times: Times, own: str) -> str:
    """The least median; the heuristic's own unless the former's upper quartile is below its lower one."""
    best = min(times, key=lambda name: times[name].median)
    return best if own not in times or times[best].upper < times[own].lower else own


def tuned(facts: plans.Facts, rows: int, is_together: bool | None, workers: Workers, timers: Timers, most: int) -> dict:
    """The row of a layer: its plan, the times of what was tried, and why others were not.

    is_together: whether a narrow layer is one kernel, None where it is to be found out.
    """
    multiply_as(facts)
    facts = InPieces(*facts) if is_together is False else facts
    subject = Subject.of(facts, rows)
    tried = candidates(facts, rows, subject.multiprocessors, most)
    if is_together and facts.is_together:
        tried = {part: tried[part] for part in ("forward", "weight", "together")}

    jobs = [Job(part, form, facts) for part, forms in tried.items() for form in forms]
    excluded: dict[str, str] = {}
    is_wrong = False
    calls: dict[str, dict[str, Callable[[], Any]]] = {part: {} for part in tried}
    for job, finding in zip(jobs, workers.examine(jobs), strict=True):
        is_wrong |= finding.is_wrong
        why = finding.why or why_not(call := subject.call(job.part, job.form))
        if why:
            excluded[f"{job.part}: {label(job.form)}"] = why
            print(
                f"    {'WRONG, ' if finding.is_wrong else ''}left out: {job.part} {label(job.form)}: {why}", flush=True
            )
        else:
            calls[job.part][label(job.form)] = call

    milliseconds: dict[str, Times] = {}
    chosen: dict[str, Any] = {}
    for part, functions in calls.items():
        if not functions:
            raise LookupError(f"{facts.N} x {facts.K} {facts.mode}, {rows} rows: no form of {part} is left: {excluded}")
        milliseconds[part] = timers.parts(functions)
        name = winner(milliseconds[part], label(tried[part][0]))
        chosen[part] = next(form for form in tried[part] if label(form) == name)
    is_one = "together" in chosen
    if is_one and "training" in chosen:
        milliseconds["step"] = timers.parts({name: subject.step(chosen, parts) for name, parts in STEPS.items()})
        is_one = winner(milliseconds["step"], "together") == "together"
    if is_one:
        chosen |= {"training": chosen["forward"], "backward": chosen["together"]}
    plan = Plan(**{part: chosen[part] for part in PARTS})
    eager = {}
    for kind in ("forward", "training"):
        try:
            with planned(plan):
                milliseconds[f"whole {kind}"] = times = timers.layers(subject.whole(trains=kind == "training"))
        except RuntimeError as error:  # the parts are worth keeping
            excluded[f"whole {kind}"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if winner(times, "fused") == "eager":
            eager[kind] = f"{times['eager'].median:.3g} ms by eager PyTorch, {times['fused'].median:.3g} fused"
    return {
        "N": facts.N,
        "K": facts.K,
        "mode": facts.mode,
        "is_skinny": facts.is_skinny,
        "rows": rows,
        "plan": measured.encoded(plan),
        "eager": eager,
        "milliseconds": {
            part: {name: float(f"{time.median:.4g}") for name, time in times.items()}
            for part, times in milliseconds.items()
        },
        "excluded": excluded,
        "is_wrong": is_wrong,
    }


@contextmanager
def planned(plan: Plan) -> Iterator[None]:
    """Within it every layer has this plan, as far as it admits it."""
    plans.forget()
    try:
        with mock.patch.object(measured, "plan", return_value=measured.Measured(plan, "it is tuned", {})):
            yield
    finally:
        plans.forget()


def why_not(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # too large for memory, say
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


# ---------------------------------------------------------------------------------------------- all of them


def facts_of(N: int, K: int, mode: str, rows: int) -> plans.Facts:
    """Of a plain layer, as the heuristic sees it: with no GPU's name, nothing measured.

    Every assembler is trusted, since candidates are compared themselves; dispatch asks again.
    """
    dtype, precision = MODES[mode]
    target = "hip" if torch.version.hip else "cuda"  # the interpreter knows what the newest chips do
    has_descriptors = dispatch.generation_of(target, capability()) in plans.DESCRIBING
    return plans.Facts(
        N=N,
        K=K,
        dtype=dtype,
        precision=precision,
        skip="identity",
        target=target,
        capability=capability(),
        gpu="",
        is_skinny=rows <= dispatch.SKINNY,
        is_invariant=False,
        is_described=has_descriptors
        and rows > dispatch.SKINNY
        and N * dtype.itemsize % 16 == 0 == K * dtype.itemsize % 16,
        trusts_registers=True,
        work="plain",
    )


class File:
    """What tune has written so far; a later run keeps rows of the same versions, and starts anew with others."""

    def __init__(self, path: Path, is_dry: bool) -> None:
        facts = machine("cpu" if is_dry else "cuda")
        gpu = "Triton's interpreter" if is_dry else torch.cuda.get_device_name()
        self.path = path
        self.record: dict[str, Any] = {"gpu": gpu, **facts, "sources": sources(), "layers": []}
        if path.exists():
            before = json.loads(path.read_text())
            others = [fact for fact in SAME if before.get(fact) != self.record[fact]]
            if others:
                print(f"{path} is of another {', '.join(others)}: all anew")
            else:
                self.record["layers"] = before["layers"]

    def row(self, *key: object) -> dict[str, Any] | None:
        """By N, K, mode and is_skinny."""
        rows = self.record["layers"]
        return next((row for row in rows if (row["N"], row["K"], row["mode"], row["is_skinny"]) == key), None)

    def add(self, row: dict[str, Any]) -> None:
        before = self.row(row["N"], row["K"], row["mode"], row["is_skinny"])
        self.record["layers"] = [other for other in self.record["layers"] if other is not before] + [row]
        scratch = self.path.with_name(self.path.name + ".part")
        scratch.write_text(json.dumps(self.record, indent=1) + "\n")
        scratch.replace(self.path)  # a run that is killed leaves the rows that it had


def is_one_kernel(row: dict[str, Any]) -> bool:
    return row["plan"]["backward"]["form"] == Together.__name__


def size(text: str) -> tuple[int, int]:
    """N and K of 512 or 2048x512."""
    N, _, K = text.partition("x")
    return int(N), int(K or N)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: where dispatch reads it")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no layer later than this")
    parser.add_argument("--widths", nargs="+", type=size, default=SIZES, metavar="N[xK]")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["bf16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[65536, 64], help=f"up to {dispatch.SKINNY} are few")
    parser.add_argument("--again", action="store_true", help="measure what the file has already")
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--most", type=int, default=MOST, help="candidates of a part [%(default)s]")
    parser.add_argument("--dry", action="store_true", help="tiny, in Triton's interpreter, by the host's clock")
    options = parser.parse_args(arguments)
    if not options.dry and not HAS_GPU:
        parser.error("there is no GPU to tune for; --dry shows that the script itself works")
    if options.dry and HAS_GPU:
        parser.error("--dry is for machines without a GPU")
    if options.dry:
        options.widths = [(32, 32), (136, 136)] if options.widths == SIZES else options.widths
        options.mode = ["fp16"] if options.mode == ["bf16"] else options.mode  # the interpreter is wrong in bf16
        options.rows = [72, 8] if options.rows == [65536, 64] else options.rows
        options.jobs, options.most = 0, min(options.most, 2)
    elif options.out is None:
        options.out = measured.file(torch.cuda.get_device_name())
    if options.out is None:
        parser.error("--dry needs --out FILE")
    options.out.parent.mkdir(parents=True, exist_ok=True)

    file, workers = File(options.out, options.dry), Workers(options.jobs)
    try:
        failed = _tune(file, workers, timers(options.dry), options)
    finally:
        workers.close()
    if options.out.resolve() != (home := measured.file(file.record["gpu"])).resolve():
        print(f"for dispatch to read it: cp {options.out} fusedres/tiles/{home.name}")
    return 1 if failed else 0


def _tune(file: File, workers: Workers, timers: Timers, options: argparse.Namespace) -> bool:
    """Whether a candidate was wrong, or a layer had no form left. Many rows first: few follow what these decide."""
    start, failed = time.perf_counter(), False
    for rows in sorted(options.rows, reverse=True):
        for mode in options.mode:
            for N, K in options.widths:
                facts, name = facts_of(N, K, mode, rows), f"{N} x {K} {mode} {rows} rows"
                many, before = (file.row(N, K, mode, is_skinny) for is_skinny in (False, facts.is_skinny))
                is_together = None if not facts.is_skinny else many is None or is_one_kernel(many)
                is_valid = before is not None and (many is None or is_one_kernel(before) == is_one_kernel(many))
                if is_valid and not options.again:
                    print(f"{name}: measured before")
                    continue
                if (spent := time.perf_counter() - start) > options.budget_s:
                    print(f"{name}: left out, {spent:.0f} s are over")
                    continue
                print(f"{name}, at {spent:.0f} s", flush=True)
                try:
                    row = tuned(facts, rows, is_together, workers, timers, options.most)
                except (LookupError, torch.OutOfMemoryError) as error:
                    print(f"    FAILED: {error}", flush=True)
                    failed = True
                    continue
                failed |= row.pop("is_wrong")
                file.add(row)
                for part, times in row["milliseconds"].items():
                    line = ", ".join(f"{form} {ms}" for form, ms in sorted(times.items(), key=lambda item: item[1])[:3])
                    print(f"    {part}: {line} ms", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
