"""Which cuts of a layer DTensor is offered, without processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.distributed.tensor import DTensor, Replicate

import fusedres.parallel  # noqa: F401
from fusedres.kernels.spec import LayerSpec, Operands
from fusedres.parallel import sharding


def described(x, weight, mesh=(2,)):
    """Descriptions of x and weight, as DTensor hands them to a rule."""
    made = [SimpleNamespace(ndim=len(s), shape=s, mesh=SimpleNamespace(shape=mesh)) for s in (x, weight)]
    return Operands(*made)


def offered(spec, **kinds):
    """x's and the weight's placement of each cut but the whole."""
    first, *cuts = sharding.cuts(described((4, 6, 8), (8, 8), **kinds), spec)
    assert set(first) == {Replicate()}
    return [f"{cut.x} {cut.weight}" for cut in cuts]


ROWS, COLUMNS, INNER = ["S(0) R", "S(1) R"], "R S(0)", "S(2) S(1)"


@pytest.mark.parametrize(
    ("spec", "cuts"),
    [
        (LayerSpec(skip="none"), [*ROWS, COLUMNS]),
        (LayerSpec(skip="none", activation="none"), [*ROWS, COLUMNS, INNER]),
        (LayerSpec(skip="residual", activation="none", drop_path=0.5), [COLUMNS, INNER]),
        (LayerSpec(skip="projection", activation="none"), [*ROWS, COLUMNS]),
        (LayerSpec(skip="identity", activation="none"), ROWS),
        (LayerSpec(skip="concat"), ROWS),
        (LayerSpec(skip="none", watch=3), []),
    ],
    ids=["no-skip", "linear", "dropping", "projection", "identity", "concat", "watched"],
)
def test_a_layer_takes_these_cuts(spec, cuts):
    assert offered(spec) == cuts


@pytest.mark.parametrize(
    ("size", "mesh", "is_shared"),
    [
        (8, (4,), True),
        (7, (4,), True),  # 2, 2, 2, 1
        (9, (4,), False),  # 3, 3, 3, none
        (3, (4,), True),  # too few for any cut, which DTensor sees by itself
        (0, (2,), False),
        (8, (2, 2), True),
        (10, (2, 4), False),  # by both: 5 are 2, 2, 1, none
        (2, (2, 4), True),
    ],
)
def test_no_rank_is_left_without_a_share(size, mesh, is_shared):
    assert sharding._gives_each_one(size, mesh) == is_shared


def test_all_is_gathered_where_torch_cannot_tell_options_apart(monkeypatch):
    """Its choice for one layer would be another's."""
    monkeypatch.setattr(sharding, "_TELLS_OPTIONS_APART", False)
    assert offered(LayerSpec(skip="none")) == []
    assert sharding._tells_options_apart(*sharding._OPERATORS)
    monkeypatch.delattr(DTensor, "_op_dispatcher")
    assert not sharding._tells_options_apart(*sharding._OPERATORS)
