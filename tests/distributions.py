"""Real distributions on a path, and a fresh interpreter that looks at them, so that nothing leaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from textwrap import dedent
from typing import Any

ROOT = Path(__file__).parents[1]


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
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *options, "-W", "error", "-c", _program(code)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _program(code: str) -> str:
    return f"import json\nanswer = None\n{dedent(code)}\nprint(json.dumps(answer))"


def packages(folder: Path, *, without: str) -> Path:
    """Links to the packages of this environment but for those whose name starts like this."""
    folder.mkdir(exist_ok=True)
    for scheme in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(scheme)).iterdir():
            # A .pth file is read in place, and would bring back what is left out.
            if not entry.name.startswith(without) and entry.suffix != ".pth":
                link = folder / entry.name
                if not link.exists():
                    link.symlink_to(entry)
    return folder


class Environment:
    """A fresh environment with core and some projects installed by pip, and what they depend on in reach.

    Nothing is fetched: the packages that are not ours are those of the environment of the tests.
    """

    def __init__(self, folder: Path, *projects: Path) -> None:
        venv.create(folder / "environment", symlinks=True)
        self.scripts = folder / "environment" / "bin"
        dependencies = packages(folder / "packages", without="influence_framework")
        self._variables = os.environ | {"PYTHONPATH": str(dependencies), "PYTHONDONTWRITEBYTECODE": "1"}
        self.folder = folder
        self.install(ROOT, *projects)

    def install(self, *projects: str | Path) -> str:
        """Build and install projects."""
        options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
        return self.python("-m", "pip", "install", *options, *map(str, projects))

    def python(self, *arguments: str) -> str:
        """What the interpreter prints; it runs outside the repository."""
        return self._run("python", *arguments)

    def influence(self, *arguments: str) -> str:
        """What the command prints."""
        return self._run("influence", *arguments)

    def answer(self, code: str) -> Any:
        """What ``code`` leaves in ``answer``."""
        return json.loads(self.python("-W", "error", "-c", _program(code)).splitlines()[-1])

    def _run(self, command: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(self.scripts / command), *arguments],
            env=self._variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert not done.returncode, done.stdout + done.stderr
        return done.stdout
