"""Running a study of `fusedres.studies` in a small form."""

from __future__ import annotations

import argparse
from types import ModuleType

import torch

from fusedres.studies.report import Report


def run(study: ModuleType, *arguments: object) -> Report:
    """The study's report on a CPU, from arguments as the command line takes them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    study.options(parser)
    threads = torch.get_num_threads()
    try:
        return study.run(parser.parse_args([str(one) for one in arguments]), torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)


def holds(report: Report, *words: str) -> list[bool]:
    """Of the findings whose claim has one of these words, or of all."""
    found = [one.holds for one in report.findings if not words or any(word in one.claim for word in words)]
    assert found, f"no claim of {words}"
    return found
