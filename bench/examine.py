"""One candidate of `bench/tune.py`: what it runs, whether it is right on integers, and whether it spills."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock

import torch
from configurations import Configuration, FormConfiguration, everything
from exact import HEAVIEST, cases, mismatches
from exact_forms import form_cases, form_mismatches
from integers import DEVICE, HAS_GPU  # before triton

from fusedres import dispatch, launch, ops, plans, reference
from fusedres.kernels.config import Elementwise, Inside, PersistentTile, Separate, SplitTile, Tile, Together
from fusedres.kernels.spec import LayerSpec, Operands
from fusedres.kernels.triton import (
    layer,
    layer_backward,
    layer_backward_inside,
    layer_library,
    layer_narrow,
    layer_persistent,
    weight_gradient,
)

CHECKED_ROWS = 300  # of the layer that is compiled to be timed
KERNELS = {
    layer: ("_forward_kernel",),
    layer_backward: ("_dz_kernel", "_dx_kernel"),
    layer_backward_inside: ("_kernel",),
    layer_library: ("_finish_kernel",),
    layer_narrow: ("_backward_kernel",),
    layer_persistent: ("_tiled_kernel", "_whole_kernel"),
    weight_gradient: ("_pointer_kernel", "_descriptor_kernel"),
}
# The kernel, and the layer of bench/exact_forms.py, by which a form is compared
COMPARED = {
    PersistentTile: ("persistent", "post-identity"),
    Elementwise: ("finish", "residual"),
    Inside: ("inside", "plain"),
    Together: ("narrow", "residual"),
    SplitTile: ("weight", "bare"),
}


class Job(NamedTuple):
    """A form for a part of a layer's plan."""

    part: str
    form: Any
    facts: plans.Facts


class Finding(NamedTuple):
    """Why a form is not eligible, empty where it is; what comes of integers and is not equal to float64."""

    why: str = ""
    is_wrong: bool = False


class Subject(NamedTuple):
    """The layer that is timed, y = x + gelu(x wᵀ + b), without x where it is not square; g, and what forward kept."""

    spec: LayerSpec
    operands: Operands
    g: torch.Tensor
    kept: torch.Tensor
    multiprocessors: int

    @classmethod
    def of(cls, facts: plans.Facts, rows: int) -> Subject:
        def make(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=DEVICE).to(facts.dtype)

        x, w, b = make(rows, facts.K), make(facts.N, facts.K) * facts.K**-0.5, make(facts.N)
        operands = Operands(x, w, b)
        kept = make(rows, facts.N).to(operands.kept_dtype)
        spec = LayerSpec("gelu", skip="identity" if facts.N == facts.K else "none")
        return cls(spec, operands, make(rows, facts.N), kept, dispatch.multiprocessors(x.device))

    def call(self, part: str, form: Any) -> Callable[[], Any]:
        """A part of the layer in this form."""
        x, w = self.operands.x, self.operands.weight
        how = dispatch.precision(x.dtype)
        wanted = everything(self.operands)
        if part in ("forward", "training"):
            keeps = part == "training"
            return partial(launch._triton_forward, self.operands, self.spec, form, x.dtype, keeps, False)
        if part == "weight":
            return partial(layer_backward.product_over_rows, self.g, x, w.dtype, form, how, self.multiprocessors)
        if part == "together":
            given = (self.g, self.operands, self.spec, wanted, form.rows, 2 * self.multiprocessors, how)
            return partial(layer_narrow.backward, *given)
        given = (self.g, self.operands, self.kept, None, self.spec, wanted._replace(weight=False))
        return partial(layer_backward.backward, *given, form, None, how, self.multiprocessors)

    def whole(self, trains: bool) -> dict[str, Callable[[], object]]:
        """The layer as modules that have checked it call it, forward or as a step of training: fused and eager."""
        leaves = Operands(*[t if t is None else t.detach().requires_grad_(trains) for t in self.operands])
        given = [t for t in leaves if t is not None]

        def of(layer: Callable[[Operands, LayerSpec], torch.Tensor]) -> Callable[[], object]:
            def call() -> object:
                with torch.set_grad_enabled(trains):
                    y = layer(leaves, self.spec)
                return torch.autograd.grad(y, given, self.g) if trains else y

            return call

        return {"fused": of(ops.residual_linear), "eager": of(reference.layer)}

    def step(self, chosen: dict[str, Any], parts: tuple[str, ...]) -> Callable[[], object]:
        """Several parts of the layer, one after another."""
        calls = [self.call(part, chosen[part]) for part in parts]
        return lambda: [call() for call in calls]


def examined(job: Job) -> Finding:
    """Compiles the candidate, for the layer to be timed and for one of integers, and compares the latter."""
    multiply_as(job.facts)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # and so torch.empty hands out NaN
    try:
        with compiled_kernels() as built:
            wrong = _mismatches(job)
            Subject.of(job.facts, CHECKED_ROWS if HAS_GPU else 8).call(job.part, job.form)()
        if HAS_GPU:
            torch.cuda.synchronize()
    except Exception as error:
        _leave_if_lost()
        return Finding(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    finally:
        torch.use_deterministic_algorithms(before)
    if wrong:
        return Finding(f"wrong: {'; '.join(wrong)[:200]}", True)
    spilled = max((4 * kernel.n_spills for kernel in built), default=0)
    return Finding(f"spills {spilled} bytes" if spilled else "")


def _mismatches(job: Job) -> list[str]:
    N, K, mode = min(job.facts.N, 1024), min(job.facts.K, 1024), job.facts.mode
    form, found = job.form, []
    by_pointers = {"forward": form} if isinstance(form, Tile) else {}
    if isinstance(form, Separate):
        by_pointers = {"dz": form.dz} | ({} if form.dx is None else {"dx": form.dx})
    for kernel, tile in by_pointers.items():
        every = cases([Configuration(kernel, mode, False, job.facts.is_ragged, tile)], is_small=True)
        found += [text for case in every if case.layer == HEAVIEST[kernel] for text in mismatches(case, 0)]
    if type(form) in COMPARED:
        kernel, name = COMPARED[type(form)]
        tile = form[0] if isinstance(form, (Inside, Together)) else form
        every = form_cases([FormConfiguration(kernel, mode, N, K, job.part == "training", tile)], is_small=True)
        found += [text for case in every if case.layer == name for text in form_mismatches(case, 0)]
    return found


@contextmanager
def compiled_kernels() -> Iterator[list[Any]]:
    """Those that launchers launch meanwhile, as Triton hands them out; its interpreter has none."""
    found: list[Any] = []

    class Watched:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: found.append(self.kernel[grid](*args, **kwargs))

    with ExitStack() as stack:
        for module, names in KERNELS.items():
            for name in names:
                stack.enter_context(mock.patch.object(module, name, Watched(getattr(module, name))))
        yield found
    found[:] = [kernel for kernel in found if kernel is not None]


def multiply_as(facts: plans.Facts) -> None:
    torch.set_float32_matmul_precision("high" if facts.precision == "tf32" else "highest")


def _leave_if_lost() -> None:
    """A process whose GPU memory a kernel has violated can do nothing more: the jobs left are for another."""
    try:
        if HAS_GPU:
            torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)


class Workers:
    """Processes that examine candidates; none for 0."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.pool: ProcessPoolExecutor | None = None

    def examine(self, jobs: list[Job]) -> list[Finding]:
        """Where a process dies, all jobs left without an answer are done again, each in a process of its own."""
        if self.jobs == 0:
            return [examined(job) for job in jobs]
        self.pool = self.pool or self._fresh(self.jobs)
        futures: list[Future[Finding]] = []
        with suppress(BrokenProcessPool):  # it may die before all are asked
            for job in jobs:
                futures.append(self.pool.submit(examined, job))
        found = [_answer(future) for future in futures] + [None] * (len(jobs) - len(futures))
        if None in found:
            self.close()
        return [self._alone(job) if finding is None else finding for job, finding in zip(jobs, found, strict=True)]

    def _alone(self, job: Job) -> Finding:
        with self._fresh(1) as pool:
            return _answer(pool.submit(examined, job)) or Finding("its process died")

    def _fresh(self, jobs: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        self.pool = None


def _answer(future: Future[Finding]) -> Finding | None:
    try:
        return future.result()
    except BrokenProcessPool:
        return None
