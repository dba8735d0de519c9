"""Compare with other libraries: how well scores predict retraining, in what time and memory.

Run with ``make bench``, or ``python benchmarks/comparison/compare.py``. Every library runs in an environment of
its own, made here; every figure in ``docs/benchmarks.md`` is measured in the run that wrote the file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import report
import torch
from cases import CASES
from report import LIBRARIES, Result

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = HERE / "cache"
ENVIRONMENTS = ROOT / ".venv-peers"
STRENGTHS = (1e-2, 1e-1, 1e-3, 1.0, 1e-4)
"""λ, in units of the curvature of the mean loss, the likeliest first; a method is judged at its best one."""
LIMIT = 180
"""Seconds for all λ of one method on one case."""


def environment(library: str) -> Path:
    """The Python of a library's environment, which is made where its requirements have changed."""
    if library == "ours":
        return Path(sys.executable)
    folder = ENVIRONMENTS / library
    wanted = (HERE / "requirements" / f"{library}.txt").read_text()
    stamp = folder / "requirements.txt"
    python = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"Setting up the environment of {library} ...", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        requirements = HERE / "requirements" / f"{library}.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True)
        stamp.write_text(wanted)
    return python


def versions(python: Path, names: tuple[str, ...]) -> str:
    code = "import importlib.metadata as m, sys; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    done = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="on what an earlier run measured, nothing anew")
    parser.add_argument("--keep", action="store_true", help="keep scores of an earlier run that are there")
    parser.add_argument(
        "--only", choices=[case.name for case in CASES], action="append", help="without a report"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    pythons = {library: environment(library) for library in LIBRARIES}
    chosen = [case for case in CASES if case.name in (arguments.only or [case.name])]
    judgings = {}
    for case in chosen:
        data = case.data()
        trained = case.trained(data)
        folder = CACHE / case.name
        if not (arguments.keep or arguments.report):
            shutil.rmtree(folder / "results", ignore_errors=True)
        case.write(folder, data, trained)
        judgings[case.name] = case.judge(case, data, trained[0], folder / "truth")
    for library, python in [] if arguments.report else pythons.items():
        print(f"Scores of {library} ...", flush=True)
        command = [python, HERE / "adapter.py", library, *(CACHE / case.name for case in chosen)]
        command += ["--strengths", *map(str, STRENGTHS), "--limit", str(LIMIT)]
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        subprocess.run(command, check=True, env={**os.environ, **single})
    found = {
        case.name: [
            result
            for library in LIBRARIES
            for result in Result.of(CACHE / case.name / "results", library, judgings[case.name])
        ]
        for case in chosen
    }
    used = {library: versions(python, LIBRARIES[library].distributions) for library, python in pythons.items()}
    for case in chosen:
        print("\n".join(report.table(found[case.name])))
    if not arguments.only:
        seconds = None if arguments.report else time.monotonic() - start
        report.write(ROOT, list(CASES), judgings, found, used, STRENGTHS, seconds)


if __name__ == "__main__":
    main()
