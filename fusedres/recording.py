"""Who watches gradients: kernels leave here what they record of a layer's input, and whoever asked for it adds it up.

A layer that is watched has a number, which its calls carry; a network of L layers has L in a row. While a `Sink` is
open for a number, backward finds it (`of`) and notes its parts, in the form that `kernels/record.py` describes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import dispatch
from .kernels import record
from .kernels.record import Recording

_numbers = itertools.count(1)
_open: dict[int, tuple[Sink, int]] = {}  # by a layer's number: where its parts go, and its row there
_in_use: list[Sink] = []

_LIBRARY = torch.library.Library("fusedres", "FRAGMENT")
_LIBRARY.define("unscale(int watch) -> float")
_LIBRARY.define("note(Tensor parts, int watch) -> ()")


def take_numbers(count: int) -> int:
    """The first of so many numbers in a row, which nobody else has."""
    first = next(_numbers)
    for _ in range(count - 1):
        next(_numbers)
    return first


class Sink:
    """The parts that are noted in one step, for rows 0, …, rows - 1."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.is_open = True
        self.is_aside = False
        self.read_unscale: Callable[[], float | Tensor] = lambda: 1.0
        self._unscale: float | Tensor | None = None
        self._parts: list[tuple[int, Tensor]] = []
        self._spoilt: set[int] = set()

    @property
    def unscale(self) -> float | Tensor:
        """What a step's gradients are multiplied by, a number or [] on their device: as it is at its first backward."""
        if self._unscale is None:
            self._unscale = self.read_unscale()
        return self._unscale

    def note(self, row: int, parts: Tensor) -> None:
        """parts [parts, layers, ROW] of rows row, …, row + layers - 1."""
        self._parts.append((row, parts))

    def spoil(self, rows: range) -> None:
        """Of these rows nothing can be said in this step."""
        self._spoilt.update(rows)

    def take(self) -> Tensor | None:
        """[rows, ROW] in float64 on the device that noted, everything added up in one order; then it is empty."""
        parts, spoilt = self._parts, sorted(self._spoilt)
        self.clear()
        if not parts:
            return None
        total = _added_up(parts, self.rows)
        if spoilt:
            total[spoilt] = 0.0
        return total

    def clear(self) -> None:
        self._parts, self._spoilt, self._unscale = [], set(), None


@contextmanager
def opened(sink: Sink, rows: dict[int, int]) -> Iterator[None]:
    """Within it, what layers with these numbers record is noted in the sink, in these rows of it.

    RuntimeError where one of them is noted elsewhere already, by somebody who is not set aside.
    """
    before = {number: _open[number] for number in rows if number in _open}
    if any(not taken.is_aside for taken, _ in before.values()):
        raise RuntimeError("a layer of this model is being recorded already: a layer has one Recorder at a time")
    _open.update({number: (sink, row) for number, row in rows.items()})
    _in_use.append(sink)
    try:
        yield
    finally:
        sink.is_open = False
        _in_use.remove(sink)
        for number in rows:
            del _open[number]
        _open.update(before)


@contextmanager
def set_aside() -> Iterator[None]:
    """Within it, nobody who watches now sees anything."""
    before = [(sink, sink.is_open, sink.is_aside) for sink in _in_use]
    for sink, _, _ in before:
        sink.is_open, sink.is_aside = False, True
    try:
        yield
    finally:
        for sink, is_open, is_aside in before:
            sink.is_open, sink.is_aside = is_open, is_aside


def of(number: int) -> Recording | None:
    """How a layer's backward is to record its gradient, or None where nobody looks."""
    found = _open.get(number)
    if found is None or not found[0].is_open:
        return None
    sink, row = found
    return Recording(sink.unscale, sink.note, row)


def spoil(number: int, layers: int = 1) -> None:
    """These layers' gradients are differentiated themselves: nobody sees all that will come to their inputs."""
    found = _open.get(number)
    if found is not None and found[0].is_open:
        found[0].spoil(range(found[1], found[1] + layers))


def apart(x: Tensor, number: int, has_skip: bool) -> tuple[Tensor, Tensor]:
    """x as the branch and as the skip of a formula see it: what gradient comes back through both is recorded."""
    recording = of(number)
    is_bent = torch.compiler.is_compiling() or dispatch.transforms_are_active()
    if is_bent or recording is None or not x.requires_grad or not torch.is_grad_enabled():
        return x, x
    halves: dict[str, Tensor] = {}

    def arrived(name: str, gradient: Tensor) -> None:
        if torch.is_grad_enabled():
            return spoil(number)
        halves[name] = gradient.detach()
        if len(halves) == 1 + has_skip:
            branch, skip = halves["branch"], halves.get("skip")
            halves.clear()
            wide = torch.promote_types(branch.dtype, torch.float32)
            total = branch if skip is None else branch.to(wide) + skip.to(wide)
            rows = statistics([total], None if skip is None else [branch.to(wide)], recording.unscale)
            recording.note(rows.unsqueeze(0))

    branch, skip = x.view_as(x), x.view_as(x)
    branch.register_hook(lambda gradient: arrived("branch", gradient))
    if has_skip:
        skip.register_hook(lambda gradient: arrived("skip", gradient))
    return branch, skip


# ---------------------------------------------------------------------------------------------- adding up


def has_numbers(gradient: Tensor) -> bool:
    """Whether there is something to count: not in meta tensors, nested ones, and batches of gradients."""
    return gradient.layout == torch.strided and not gradient.is_meta and not dispatch.is_legacy_batch(gradient)


def statistics(totals: Sequence[Tensor], branches: Sequence[Tensor] | None, unscale: float | Tensor) -> Tensor:
    """[n, ROW] in float64 of n gradients on one device, and, where given, of the halves that came through branches."""
    device, dtypes = totals[0].device, {t.dtype for t in totals}
    with torch.no_grad():
        if len(dtypes) > 1:
            return _by_dtype(totals, branches, unscale)
        choice = dispatch.backend(device, dtypes.pop())
        if isinstance(choice, dispatch.Native):
            from .kernels.cpu import launch

            return launch.statistics(totals, branches or [], float(unscale))
        if isinstance(choice, dispatch.Triton):
            from .kernels.triton import record as kernels

            with torch.cuda.device_of(totals[0]):
                parts = kernels.statistics(totals, branches or [], unscale)
            return _added_up([(0, parts.transpose(0, 1))], len(totals))
        rows = [_formula(t, branches[i] if branches else None, unscale) for i, t in enumerate(totals)]
        return torch.stack(rows)


def _by_dtype(totals: Sequence[Tensor], branches: Sequence[Tensor] | None, unscale: float | Tensor) -> Tensor:
    rows = torch.empty(len(totals), record.ROW, dtype=torch.float64, device=totals[0].device)
    for dtype in {t.dtype: None for t in totals}:
        places = [i for i, t in enumerate(totals) if t.dtype == dtype]
        some = None if branches is None else [branches[i] for i in places]
        rows[places] = statistics([totals[i] for i in places], some, unscale)
    return rows


def _formula(total: Tensor, branch: Tensor | None, unscale: float | Tensor) -> Tensor:
    """A row, by PyTorch's own operations, in float64."""
    row = torch.zeros(record.ROW, dtype=torch.float64, device=total.device)
    g = total.detach().to(torch.promote_types(total.dtype, torch.float32)) * unscale
    wide, is_finite = g.double(), g.isfinite()
    finite = torch.where(is_finite, wide, 0.0)
    row[record.COUNT], row[record.SCALE] = g.numel(), 1.0
    if g.numel() == 0:
        return row
    row[record.SUM], row[record.SQUARES] = finite.abs().sum(), finite.square().sum()
    row[record.LARGEST], row[record.ZEROS] = finite.abs().max(), (g == 0).sum()
    if branch is not None:
        b = torch.where(is_finite, branch.detach().double() * unscale, 0.0)
        s = finite - b
        row[record.BRANCH], row[record.SKIP], row[record.PRODUCT] = b.square().sum(), s.square().sum(), (b * s).sum()
    exponents = torch.frexp(finite)[1] - 1 + record.EXPONENT_BIAS  # frexp's mantissa is from 1/2 to 1
    octaves = torch.where(finite == 0, 0, exponents).clamp(0, record.NOT_FINITE - 1)
    octaves = torch.where(is_finite, octaves, record.NOT_FINITE)
    row[record.OCTAVES :] = torch.bincount(octaves.flatten(), minlength=256).double()
    return row


def _added_up(parts: Sequence[tuple[int, Tensor]], rows: int) -> Tensor:
    """Parts of like shape together, so that a step costs few launches; those of one row in the order they came in."""
    device = parts[0][1].device
    if device.type == "cpu" and all(len(part) == 1 and part.dtype == torch.float64 for _, part in parts):
        return _added_one_by_one(parts, rows)
    total = torch.zeros(rows, record.ROW, dtype=torch.float64, device=device)
    seen: dict[int, int] = {}
    groups: dict[tuple[int, torch.Size, torch.device], list[tuple[int, Tensor]]] = {}
    for row, part in parts:
        rows_of_part = range(row, row + part.shape[1])
        turn = 1 + max(seen.get(r, 0) for r in rows_of_part)
        seen.update(dict.fromkeys(rows_of_part, turn))
        groups.setdefault((turn, part.shape, part.device), []).append((row, part))
    for group in groups.values():
        stacked = torch.stack([part for _, part in group]).double()  # [like ones, parts, layers, ROW]
        scale = stacked[..., record.SCALE]
        stacked[..., record.SUM] *= scale
        for square in (record.SQUARES, record.BRANCH, record.SKIP, record.PRODUCT):
            stacked[..., square] *= scale * scale
        found = stacked.sum(1)
        found[..., record.LARGEST] = stacked[..., record.LARGEST].amax(1)
        layers = found.shape[1]
        at = torch.tensor([row + i for row, _ in group for i in range(layers)], device=total.device)
        found, before = found.view(-1, record.ROW).to(total.device), total[at]
        merged = before + found
        merged[:, record.LARGEST] = torch.maximum(before[:, record.LARGEST], found[:, record.LARGEST])
        merged[:, record.SCALE] = 1.0
        total[at] = merged
    return total


def _added_one_by_one(parts: Sequence[tuple[int, Tensor]], rows: int) -> Tensor:
    """Parts whose unit is 1: there nothing is launched, and each operation counts."""
    in_turn, end = [], 0
    for row, part in sorted(parts, key=lambda one: one[0]):
        if row < end:
            break
        if row > end:
            in_turn.append(part.new_zeros(row - end, record.ROW))
        in_turn.append(part[0])
        end = row + part.shape[1]
    else:  # each row once: they are laid side by side
        return torch.cat([*in_turn, part.new_zeros(rows - end, record.ROW)] if end < rows else in_turn)
    total = parts[0][1].new_zeros(rows, record.ROW)
    for row, part in parts:
        some = total[row : row + part.shape[1]]
        largest = torch.maximum(some[:, record.LARGEST], part[0, :, record.LARGEST])
        some += part[0]
        some[:, record.LARGEST] = largest
    return total


@torch.library.impl(_LIBRARY, "unscale", "CompositeExplicitAutograd")
def _unscale(watch: int) -> float:
    """For the engine's node: what gradients are multiplied by before they are recorded; 0 where nobody looks."""
    recording = of(watch)
    return 0.0 if recording is None else float(recording.unscale)


@torch.library.impl(_LIBRARY, "note", "CompositeExplicitAutograd")
def _note(parts: Tensor, watch: int) -> None:
    recording = of(watch)
    if recording is not None:
        recording.note(parts)
