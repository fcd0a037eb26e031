"""dw = dzᵀ x with its rows in shares: against float64, exact on integers, by pointers and by descriptors."""

from __future__ import annotations

import pytest
import torch
from integers import HAS_GPU
from tolerances import rule_for
from torch import Tensor

from fusedres.kernels.config import SplitTile
from fusedres.kernels.triton.layer_backward import library_product_over_rows
from fusedres.kernels.triton.weight_gradient import weight_gradient

pytestmark = pytest.mark.backends("triton")
SMALL, LARGE = SplitTile(16, 32, 16, 4, 2, 1), SplitTile(128, 64, 64, 4, 3, 1)
HAS_DESCRIPTORS = not HAS_GPU or (torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0))
BYTES = 16  # that a descriptor's rows are multiples of

by_both_forms = pytest.mark.parametrize(
    "by_descriptors",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not HAS_DESCRIPTORS, reason="descriptors are Hopper's, and later chips'")
        ),
    ],
    ids=["pointers", "descriptors"],
)
on_every_dtype = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # Triton's interpreter computes bf16 wrongly
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
# M, N, K, shares: ragged everywhere; more than a group of tiles, the last group part full; more shares than steps; more
# than are added side by side; one row
SIZES = [
    (133, 40, 72, 1),
    (133, 40, 72, 5),
    (20, 296, 40, 1),
    (37, 16, 24, 7),
    (1130, 16, 24, 70),
    (1, 24, 40, 1),
    (1, 24, 40, 2),
]


def product(
    dz: Tensor,
    x: Tensor,
    tile: SplitTile = SMALL,
    by_descriptors: bool = False,
    dtype: torch.dtype = torch.float32,
    precision: str = "ieee",
    multiprocessors: int = 3,
) -> Tensor:
    tile = tile._replace(by_descriptors=by_descriptors)
    return weight_gradient(dz, x, dtype, tile, precision, multiprocessors)


def integers(rows: int, columns: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-2, 3, (rows, columns)).to(device, dtype)


def exact(dz: Tensor, x: Tensor) -> Tensor:
    return (dz.double().t() @ x.double()).float()


@by_both_forms
@on_every_dtype
@pytest.mark.parametrize(
    "tile", [SMALL, SMALL._replace(splits=3), LARGE, LARGE._replace(splits=3)], ids=lambda t: f"{t[0]}-{t.splits}"
)
def test_close_to_float64(tile, dtype, by_descriptors, device):
    dz, x = (torch.randn(300, columns, device=device).to(dtype) for columns in (40, 72))
    truth, eager = dz.double().t() @ x.double(), library_product_over_rows(dz, x)
    for rounded in {dtype, torch.float32}:
        found = product(dz, x, tile, by_descriptors, rounded)
        rule_for(rounded, "dweight").check("dweight", found, eager.to(rounded), truth, terms=len(x))


@by_both_forms
@on_every_dtype
@pytest.mark.parametrize(("M", "N", "K", "splits"), SIZES)
def test_every_element_is_exact(M, N, K, splits, dtype, by_descriptors, device):
    dz, x = integers(M, N, device, dtype), integers(M, K, device, dtype)
    assert torch.equal(product(dz, x, SMALL._replace(splits=splits), by_descriptors), exact(dz, x))


@pytest.mark.parametrize(("M", "N", "K"), [(50, 41, 71), (50, 3, 9)])
def test_rows_of_any_length_by_pointers(M, N, K, device):
    dz, x = integers(M, N, device), integers(M, K, device)
    assert torch.equal(product(dz, x, SMALL._replace(splits=2)), exact(dz, x))


@by_both_forms
def test_tf32_is_exact_on_integers(by_descriptors, device):
    dz, x = integers(100, 40, device), integers(100, 72, device)
    found = product(dz, x, LARGE._replace(splits=2), by_descriptors, precision="tf32")
    assert torch.equal(found, exact(dz, x))


@by_both_forms
@pytest.mark.parametrize("splits", [1, 2])
@on_every_dtype
def test_nothing_around_a_matrix_is_read(dtype, splits, by_descriptors, device):
    """Slices of wider and longer matrices, whose other elements are NaN."""
    dz, x = integers(50, 40, device, dtype), integers(50, 72, device, dtype)

    def surrounded(matrix: Tensor) -> Tensor:
        margin, (rows, columns) = BYTES // dtype.itemsize, matrix.shape
        wide = torch.full((rows + 40, columns + 40), float("nan"), device=device, dtype=dtype)
        wide[20 : 20 + rows, margin : margin + columns] = matrix
        return wide[20 : 20 + rows, margin : margin + columns]

    found = product(surrounded(dz), surrounded(x), SMALL._replace(splits=splits), by_descriptors)
    assert torch.equal(found, exact(dz, x))


@by_both_forms
def test_offsets_beyond_32_bits(by_descriptors, device):
    """Rows 2³⁰ elements apart: the third row's offset does not fit an int32. Untouched pages cost no memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    stride = 2**30 + 8
    x = torch.empty(2 * stride + 16, dtype=torch.float16, device=device).as_strided((3, 16), (stride, 1))
    x.copy_(integers(3, 16, device))
    dz = integers(3, 16, device, torch.float16)
    for operands in ((dz, x), (x, dz)):
        assert torch.equal(product(*operands, SMALL._replace(splits=2), by_descriptors), exact(*operands))


@by_both_forms
def test_sums_are_rounded_once(by_descriptors, device):
    """Shares of 4095 and -4094, of which fp16 holds one, add up to 1."""
    dz, x = (torch.ones(8192, 16, device=device, dtype=torch.float16) for _ in range(2))
    x[4096:] = -1
    x[[4095, 8190, 8191]] = 0
    found = product(dz, x, LARGE._replace(splits=2), by_descriptors, torch.float16)
    assert torch.equal(found, torch.ones_like(found))


@by_both_forms
@pytest.mark.parametrize("splits", [1, 5])
def test_two_runs_and_any_number_of_programs_give_the_same_bits(splits, by_descriptors, device):
    dz, x = torch.randn(200, 24, device=device), torch.randn(200, 72, device=device)
    tile = SMALL._replace(splits=splits)
    first, *others = (product(dz, x, tile, by_descriptors, multiprocessors=n) for n in (1, 1, 4))
    assert all(torch.equal(first, other) for other in others)
