"""Runs that are killed at random moments, each a process of its own: ``python -m tests.killing DIR OUTPUTS``.

Importing torch and the fit take longer than such a run: they are done once, and every run is forked off.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from influence_framework.attribution import run as module
from influence_framework.attribution import store
from tests.test_attribution import TIGHT, fitted_once
from tests.test_store import run

KILLS = 10


class Slow(store.Store):
    """Saves after every block and then rests, so that there is something to interrupt."""

    def finished(self, *arguments: object) -> None:
        super().finished(*arguments)  # type: ignore[arg-type]
        time.sleep(0.002)


def forked(work: Callable[[], object]) -> int:
    """The process that does ``work``."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def succeeded(child: int) -> bool:
    """Wait for a process: whether it ended by itself, and not by a kill."""
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a run failed")
    return os.WIFEXITED(status)


def interrupted(folder: Path, work: Callable[[Path], object], generator: random.Random) -> tuple[int, int]:
    """Stores ``folder/0``, ``folder/1``, … of runs of which ten were killed: how many stores, and kills."""
    start = time.monotonic()
    assert succeeded(forked(lambda: work(folder / "whole")))
    duration = time.monotonic() - start
    stores = kills = 0
    while kills < KILLS:
        path = folder / str(stores)
        child = forked(lambda path=path: work(path))  # type: ignore[misc]
        time.sleep(generator.uniform(0, 0.6 * duration))
        os.kill(child, signal.SIGKILL)
        if succeeded(child):
            stores += 1
        else:
            kills += 1
    assert succeeded(forked(lambda: work(folder / str(stores))))
    return stores + 1, kills


def main(folder: Path, outputs: list[object]) -> None:
    """For every output a folder of its own; what came of it as a line of JSON."""
    store.SAVE_EVERY = 0.0
    module.Store = Slow  # type: ignore[attr-defined]
    fitted_once("direct", TIGHT)
    for index, output in enumerate(outputs):
        generator = random.Random(index)
        found = interrupted(folder / str(index), lambda path, output=output: run(path, output), generator)  # type: ignore[misc]
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
