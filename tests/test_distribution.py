"""The wheel and the sdist hold the package, all of it and nothing else. `make dist` installs and runs them besides."""

from __future__ import annotations

import zipfile

import distribution
import pytest


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return distribution.build(tmp_path_factory.mktemp("distribution"), isolated=False)


@pytest.fixture(scope="module")
def expected():
    return distribution.packaged()


def test_what_is_to_be_packaged_is_seen(expected):
    some = {"fusedres/py.typed", "fusedres/kernels/cpu/network.h", "fusedres/kernels/cpu/binding.cpp"}
    some |= {"fusedres/__init__.py", "fusedres/kernels/triton/layer.py", "fusedres/studies/vanish.py"}
    assert some <= expected


def test_both_hold_the_package_and_nothing_else(built, expected):
    assert distribution.faults(built, expected) == []


def test_a_file_that_is_missing_and_one_too_many_are_found(built, expected):
    wanted = expected - {"fusedres/py.typed"} | {"fusedres/tiles/gpu.json"}
    assert distribution.faults(built, wanted) == [
        "the wheel lacks fusedres/tiles/gpu.json",
        "the wheel has fusedres/py.typed, unasked",
        "the sdist lacks fusedres/tiles/gpu.json",
        "the sdist has fusedres/py.typed, unasked",
    ]


def test_another_wheel_of_the_sdist_is_found(built, expected, tmp_path):
    other = tmp_path / built.wheel.name
    with zipfile.ZipFile(built.wheel) as whole, zipfile.ZipFile(other, "w") as less:
        for name in whole.namelist():
            if name != "fusedres/kernels/cpu/lanes.h":
                less.writestr(name, whole.read(name))
    found = distribution.faults(built._replace(wheel_of_sdist=other), expected)
    assert found == ["the wheel of the sdist has another fusedres/kernels/cpu/lanes.h"]
