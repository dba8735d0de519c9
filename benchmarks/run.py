"""Measure against other libraries at equal accuracy, and write what was measured to ``results/``.

Run with ``make bench``, or one part with ``python benchmarks/run.py --only spine``. Every number in
``results/`` is measured in the run that wrote the file.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PARTS = ("spine", "family", "ekfac", "gpt2", "growth", "preconditioners", "scale", "cluster", "advice")
RESULTS = Path(__file__).with_name("results")


def installed(name: str) -> str | None:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return None


def header(part: str, runs: int) -> str:
    packages = ("influence-framework", "pydvl", "kronfluence", "torch")
    versions = ", ".join(filter(None, map(installed, packages)))
    return (
        f"Written by `python benchmarks/run.py --only {part}`. Seconds and ratios are median "
        f"(minimum–maximum) of {runs} paired runs in one process, {torch.get_num_threads()} threads, "
        "float32, on digits: 1,500 training and 50 test images unless a row says otherwise. "
        f"{versions}, Python {platform.python_version()}, {platform.machine()}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part to run; all where left out")
    parser.add_argument("--runs", type=int, default=5, help="paired runs of each comparison")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    RESULTS.mkdir(exist_ok=True)
    for part in arguments.only or PARTS:
        lines = [f"# Benchmark: {part}", "", header(part, arguments.runs)]
        print(*lines, sep="\n")
        for line in importlib.import_module(part).report(arguments.runs):
            print(line, flush=True)
            lines.append(line)
        (RESULTS / f"{part}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
