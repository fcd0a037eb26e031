"""What a torch older than any admitted, or newer than any tested, gives at import."""

from __future__ import annotations

import pytest
from test_routes import in_another_process

from fusedres import requirement

IMPORTS = """
    import sys, warnings
    import torch

    warnings.simplefilter("error")
    torch.__version__ = {version!r}
    try:
        import fusedres
    except ImportError as error:
        print(error)
    else:
        print(fusedres.FusedResidualLinear(4)(torch.ones(2, 4)).shape)
"""


@pytest.mark.parametrize(
    ("version", "printed"),
    [
        (
            "2.10.0+cu128",
            "fusedres needs torch 2.11 or newer, and this is torch 2.10.0+cu128: pip install 'torch>=2.11'",
        ),
        ("2.20.1", "torch.Size([2, 4])"),
    ],
    ids=["older", "newer"],
)
def test_at_import(version, printed):
    """Switched to PyTorch's operations, as the engine of another torch would have to be built."""
    assert in_another_process(IMPORTS.format(version=version), FUSEDRES_NATIVE="0") == printed


@pytest.mark.parametrize("version", ["1.13.1", "2.2.0", "2.9.1", "2.10.0a0+git0", "0.4"])
def test_too_old(version):
    assert f"this is torch {version}:" in requirement.told(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git0", "2.13.0+cpu", "2.100.0", "3.0", "of-our-own"])
def test_admitted(version):
    assert requirement.told(version) is None


def test_the_package_says_the_same(pytestconfig):
    oldest = ".".join(map(str, requirement.OLDEST))
    assert f'"torch>={oldest}"' in (pytestconfig.rootpath / "pyproject.toml").read_text()
