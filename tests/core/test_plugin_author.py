"""The tutorial for plugin authors, followed word by word in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.core.plugin_folders import install, run

PAGE = (Path(__file__).parents[2] / "docs" / "plugin-author.md").read_text("utf-8")
BLOCK = re.compile(
    r"^(?:<!-- file: (?P<file>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
PROGRAMS = {"torchweld": ["-m", "torchweld"], "pytest": ["-m", "pytest"], "python": []}


def type_in(code: str, folder: Path, site: Path) -> None:
    """Do what a block of the console says; its lines of output have to appear."""
    command, *_ = commands = [line[2:].split() for line in code.splitlines() if line[:2] == "$ "]
    assert command
    for program, *words in commands:
        if program == "pip":
            assert words == ["install", "-e", "."]
            install(folder, site)
            continue
        printed = run(*PROGRAMS[program], *words, folder=folder, site=site)
    expected = [line for line in code.splitlines() if line[:2] != "$ " and line != "..."]
    assert [line for line in expected if line not in printed] == []


@pytest.mark.slow
def test_the_tutorial_ends_with_a_plugin_that_is_found_and_passes_its_tests(
    tmp_path: Path,
) -> None:
    folder, site = tmp_path / "empty", tmp_path / "site"
    done = []
    for block in BLOCK.finditer(PAGE):
        if block["file"]:
            place = folder / block["file"]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(block["code"], "utf-8")
        else:
            type_in(block["code"], folder, site)
        done.append(block["file"] or block["code"].split()[1])

    assert done == [
        "src/torchweld_centralize/__init__.py",
        "src/torchweld_centralize/surgery.py",
        "pyproject.toml",
        "pip",
        "torchweld",
        "tests/test_centralize.py",
        "pytest",
        "train.py",
        "python",
    ]
