"""``torchweld new-plugin`` writes a plugin that is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.core.plugin_folders import install, run
from torchweld.cli import main


def new_plugin(*words: str, directory: Path) -> Result:
    return CliRunner().invoke(main, ["new-plugin", *words, "--directory", str(directory)])


def test_the_new_plugin_has_every_entry_of_a_distribution(tmp_path: Path) -> None:
    made = new_plugin("Tidy_ReLU", directory=tmp_path)

    folder = tmp_path / "torchweld-tidy-relu"
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert made.exit_code == 0
    assert found == [
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "src/torchweld_tidy_relu/__init__.py",
        "src/torchweld_tidy_relu/py.typed",
        "src/torchweld_tidy_relu/surgery.py",
        "tests/test_conformance.py",
    ]
    assert "$" not in "".join(p.read_text() for p in folder.rglob("*.py"))


@pytest.mark.slow
def test_the_new_plugin_installs_is_discovered_and_passes_its_tests(tmp_path: Path) -> None:
    new_plugin("tidy-relu", directory=tmp_path)
    folder, site = tmp_path / "torchweld-tidy-relu", tmp_path / "site"
    install(folder, site)

    listed = run("-m", "torchweld", "plugins", folder=tmp_path, site=site)
    planned = run("-m", "torchweld", "plan", "surgery=tidy_relu", folder=tmp_path, site=site)
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", folder=folder, site=site)

    assert "torchweld-tidy-relu 0.1.0" in listed
    assert "tidy_relu" in planned
    assert " passed" in tested
    assert "failed" not in tested


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "torchweld-mine").mkdir()
    (tmp_path / "torchweld-mine" / "notes.txt").write_text("mine")

    made = new_plugin("mine", directory=tmp_path)

    assert made.exit_code == 2
    assert "is there already, and nothing is overwritten" in made.output
    assert [path.name for path in (tmp_path / "torchweld-mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["7up", "a b", "../a", "a--b", "-", "torchweld-"])
def test_a_name_that_no_package_can_have_is_refused(name: str, tmp_path: Path) -> None:
    made = CliRunner().invoke(main, ["new-plugin", "--directory", str(tmp_path), "--", name])

    assert made.exit_code == 2
    assert "cannot be the name of a package" in made.output
    assert list(tmp_path.iterdir()) == []
