"""Programs run by several processes of ``torch.distributed``."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def found_by(count: int, program: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What each of ``count`` processes that run the module ``program`` has left in ``folder``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    ended = subprocess.run(
        [*command, "-m", program, str(folder), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [pickle.loads((folder / f"{number}.pickle").read_bytes()) for number in range(count)]
