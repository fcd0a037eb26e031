"""The launches of every kernel that ships, caught on their way to a GPU that need not be there."""

from __future__ import annotations

from typing import NamedTuple
from unittest import mock

import torch
from compiled import Launch, catch
from configurations import (
    MODES,
    RECORD_KERNELS,
    Configuration,
    FormConfiguration,
    Layer,
    Stack,
    StackConfiguration,
    SumConfiguration,
    everything,
)

from fusedres.kernels.config import Separate, StackTile, StackTiles, Tile
from fusedres.kernels.record import Recording
from fusedres.kernels.spec import LayerSpec, Terms, WantedTerms
from fusedres.kernels.triton import (
    layer,
    layer_backward,
    layer_backward_inside,
    layer_library,
    layer_narrow,
    layer_persistent,
    record,
    residual,
    stack,
    stack_backward,
    sums,
    weight_gradient,
)

ALIGNED, RAGGED = 1024, 1003  # widths: multiples of 16, which kernels are specialised for, and not
PROGRAMS = 132  # multiprocessors
ADD = sums._add_kernel
CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100}

# by what they are: one product and a skip; everything that a kernel can do at once, backward recomputing z
PLAIN, HEAVY = "plain", "heavy"
SCALED = "scaled"  # of runs: all but dropped rows, whose loops the compiler does not pipeline
RECORDED = "recorded"  # backward, plain but for what it records of the gradient; slower where it spills, and no fault


class Job(NamedTuple):
    """One kernel to compile."""

    arch: str
    configuration: Configuration | StackConfiguration | SumConfiguration | FormConfiguration
    activation: str = "gelu"
    load: str = HEAVY

    def __str__(self) -> str:
        return f"{self.arch} {self.configuration} {self.load} {self.activation}"


def of(job: Job) -> Launch:
    """The launch of a job's kernel."""
    c = job.configuration
    dtype, precision = MODES[c.mode]
    if isinstance(c, SumConfiguration):
        return sum_launches(c, dtype)[c.kernel]
    if isinstance(c, StackConfiguration):
        return stack_launches(job, dtype, precision)[c.kernel]
    if isinstance(c, FormConfiguration):
        return record_launch(c, dtype) if c.kernel in RECORD_KERNELS else form_launch(job, dtype, precision)
    width, keeps = (RAGGED if c.is_ragged else ALIGNED), job.load != HEAVY
    recording = _recording() if job.load == RECORDED else None
    return launches(_layer(job), dtype, precision, c.tile, width, keeps, recording)[c.kernel]


def launches(
    subject: Layer,
    dtype: torch.dtype,
    precision: str,
    tile: Tile,
    width: int,
    keeps: bool,
    recording: Recording | None = None,
) -> dict[str, Launch]:
    """The launches of a layer [4096, width] -> [4096, width], by kernel, caught on their way to a GPU."""
    found: dict[str, Launch] = {}

    def make(_: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    operands, spec = subject.operands(4096, width, width, make), subject.spec
    with (
        mock.patch.object(layer, "_forward_kernel", catch(found, "forward", layer._forward_kernel)),
        mock.patch.object(layer_backward, "_dz_kernel", catch(found, "dz", layer_backward._dz_kernel)),
        mock.patch.object(layer_backward, "_dx_kernel", catch(found, "dx", layer_backward._dx_kernel)),
        mock.patch.object(sums, "_add_kernel", catch(found, "sums", ADD)),
    ):
        y, z, s = layer.forward(operands, spec, dtype, tile, precision, True, spec.skip == "projection")
        z, s = (z, s) if keeps else (None, None)
        wanted = everything(operands)
        layer_backward.backward(
            y, operands, z, s, spec, wanted, Separate(tile, tile), None, precision, PROGRAMS, recording
        )
    return found


def record_launch(c: FormConfiguration, dtype: torch.dtype) -> Launch:
    """Of two gradients [4096, N], where it keeps also of what came through the branches."""
    found: dict[str, Launch] = {}
    gradients = [torch.empty(4096, c.N, dtype=dtype, device="meta") for _ in range(2)]
    with mock.patch.object(record, "_statistics_kernel", catch(found, c.kernel, record._statistics_kernel)):
        record.statistics(gradients, gradients if c.keeps else [], 1.0)
    return found[c.kernel]


def form_launch(job: Job, dtype: torch.dtype, precision: str) -> Launch:
    """Of a layer [4096, K] -> [4096, N] in another form; heavy ones learn their scales and drop rows."""
    c = job.configuration
    assert isinstance(c, FormConfiguration)
    found: dict[str, Launch] = {}
    is_heavy = job.load == HEAVY

    def make(_: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    subject = Layer(LayerSpec(job.activation, skip="identity" if c.N == c.K else "none"))
    is_inside = c.kernel == "inside"
    if is_heavy and not (is_inside and not c.keeps):  # a tile for plain layers is given no other
        is_square = c.kernel in ("inside", "persistent")  # of these, whole ones take no residual tensor
        skip = "identity" if is_square and c.N == c.K else "none" if is_square else "residual"
        subject = Layer(LayerSpec(job.activation, "post", skip, drop_path=0.1), True, skip == "residual")
    if is_inside and c.keeps and not is_heavy:  # where a is learned, dz is inside of order "pre" alone
        subject = Layer(LayerSpec(job.activation, skip="identity", drop_path=0.1), True)
    operands, spec = subject.operands(4096, c.N, c.K, make), subject.spec
    if is_inside and is_heavy:
        operands = operands._replace(branch_scale=None)
    g, recording = make("g", 4096, c.N), _recording() if job.load == RECORDED else None
    kernels = {
        "persistent": (layer_persistent, ("_tiled_kernel", "_whole_kernel")),
        "inside": (layer_backward_inside, ("_kernel",)),
        "narrow": (layer_narrow, ("_backward_kernel",)),
        "finish": (layer_library, ("_finish_kernel",)),
        "weight": (weight_gradient, ("_pointer_kernel", "_descriptor_kernel")),
        "sums": (layer_narrow, ("_backward_kernel",)),
    }
    module, names = kernels[c.kernel]
    caught = {
        name: catch(found, "narrow" if module is layer_narrow else c.kernel, getattr(module, name)) for name in names
    }
    with mock.patch.multiple(module, **caught), mock.patch.object(sums, "_add_kernel", catch(found, "sums", ADD)):
        if c.kernel == "persistent":
            layer_persistent.forward(operands, spec, dtype, c.tile, precision, c.keeps, PROGRAMS)
        elif c.kernel == "inside":
            kept = torch.empty(4096, c.N, dtype=operands.kept_dtype, device="meta")
            wanted = everything(operands)
            layer_backward_inside.dz_and_dx(g, operands, kept, spec, wanted, c.tile, precision, PROGRAMS)
        elif c.kernel in ("narrow", "sums"):
            rows = c.tile if c.kernel == "narrow" else StackTile(32, 4, 3)
            layer_narrow.backward(g, operands, spec, everything(operands), rows, 2 * PROGRAMS, precision, recording)
        elif c.kernel == "finish":
            layer_library.forward(operands, spec, dtype, c.tile, c.keeps, False)
        else:
            weight_gradient.weight_gradient(g, operands.x, dtype, c.tile, precision, PROGRAMS)
    return found[c.kernel]


def _recording() -> Recording:
    return Recording(torch.empty(1, device="meta"), lambda row, parts: None, 0)


def stack_launches(job: Job, dtype: torch.dtype, precision: str) -> dict[str, Launch]:
    """Those of a run of 8 layers [4096, d]; a heavy one's backward recomputes, where it has a choice."""
    found: dict[str, Launch] = {}
    c = job.configuration
    assert isinstance(c, StackConfiguration)
    subject = (
        Stack(job.activation)
        if job.load in (PLAIN, RECORDED)
        else Stack(job.activation, "post", True, True, job.load == HEAVY)
    )

    def make(_: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, run, keep_every = make("x", 4096, c.d), subject.run(8, c.d, make), 3 if job.load == HEAVY else 1
    keep_every = keep_every if c.sums_weight else 1
    with (
        mock.patch.object(stack, "_forward_kernel", catch(found, "stack_forward", stack._forward_kernel)),
        mock.patch.object(
            stack_backward, "_backward_kernel", catch(found, "stack_backward", stack_backward._backward_kernel)
        ),
        mock.patch.object(sums, "_add_kernel", catch(found, "sums", ADD)),
    ):
        y, kept = stack.forward(x, run, c.tile, precision, keep_every)
        tiles = StackTiles(c.tile, c.tile)
        given = (y, x, kept, run, subject.wanted(), tiles, precision, keep_every, 264, c.sums_weight)
        stack_backward.backward(*given, _recording() if job.load == RECORDED else None)
    return found


def sum_launches(c: SumConfiguration, dtype: torch.dtype) -> dict[str, Launch]:
    """Those of a sum whose scales are all learned and that drops samples; its memory is c.view's."""
    found: dict[str, Launch] = {}

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    memory, scale = c.view.stretches * c.view.length, make(c.view.channels) if c.per != "all" else make()
    terms = Terms(make(memory), make(memory), scale, make(), torch.tensor(2**62 + 2**31 + 1))
    spec = LayerSpec("none", skip="residual", drop_path=0.1)
    with (
        mock.patch.object(residual, "_forward_kernel", catch(found, "sum_forward", residual._forward_kernel)),
        mock.patch.object(residual, "_backward_kernel", catch(found, "sum_backward", residual._backward_kernel)),
    ):
        residual.forward(terms, spec, c.view, make(memory), c.tile)
        wanted = WantedTerms(True, True, True, True)
        residual.backward(make(memory), terms, spec, c.view, make(memory), make(memory), wanted, c.tile)
    return found


def _layer(job: Job) -> Layer:
    has_projection = job.configuration.has_projection
    if job.load in (PLAIN, RECORDED):
        return Layer(LayerSpec(job.activation, skip="projection" if has_projection else "identity"))
    spec = LayerSpec(job.activation, order="post", skip="projection" if has_projection else "residual", drop_path=0.1)
    if job.configuration.kernel == "dx" and not has_projection:  # where a residual is given, dx is a product alone
        spec = spec._replace(order="pre", skip="identity")
    return Layer(spec, is_learned=True, has_residual=spec.skip == "residual")
