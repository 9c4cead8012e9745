"""Plugins that tests write into folders, installed into other folders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ENTRY_POINTS = re.compile(r"\[project\.entry-points\.torchweld\]\n(.+?)\n(?:\n|$)", re.DOTALL)


def install(folder: Path, target: Path) -> None:
    """Install the distribution of ``folder`` into ``target``: by pip where it can build."""
    if find_spec("hatchling"):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        offline = ["--no-index", "--no-build-isolation", "--no-deps", "--target", str(target)]
        done = subprocess.run(
            [*pip, *offline, str(folder)], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return
    lay_out(folder, target)


def lay_out(folder: Path, target: Path) -> None:
    """Write what pip would have written."""
    shutil.copytree(folder / "src", target, dirs_exist_ok=True)
    project = (folder / "pyproject.toml").read_text("utf-8")
    found = re.search(r'^name = "(.+)"\nversion = "(.+)"$', project, re.MULTILINE)
    entry_points = ENTRY_POINTS.search(project)
    assert found is not None
    assert entry_points is not None
    name, version = found.groups()
    info = target / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = entry_points[1].replace('"', "")
    (info / "entry_points.txt").write_text(f"[torchweld]\n{lines}\n")


def run(*command: str, folder: Path, site: Path, code: int = 0) -> str:
    """Run Python in ``folder`` with what is installed in ``site``; returns what it prints."""
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout
