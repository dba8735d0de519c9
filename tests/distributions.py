"""Real distributions on a path, and a fresh interpreter that looks at them, so that nothing leaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any


def install(folder: Path, distribution: str, source: str, *, version: str | None = "1.2.3") -> Path:
    """Lay a distribution with one module and one entry point, as pip would, into ``folder``.

    Without a version its metadata has none.
    """
    module = distribution.replace("-", "_")
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    stated = f"Version: {version}\n" if version else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\n{stated}")
    (info / "entry_points.txt").write_text(f"[influence_framework]\n{module} = {module}\n")
    return folder


def ask(code: str, *path: Path, options: tuple[str, ...] = ()) -> Any:
    """What ``code`` leaves in ``answer``, run by a fresh interpreter with ``path`` before its own."""
    program = f"import json\nanswer = None\n{dedent(code)}\nprint(json.dumps(answer))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *options, "-W", "error", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
