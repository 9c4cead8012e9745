from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement

if TYPE_CHECKING:
    from email.message import Message

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "core", *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
PLUGINS = [folder.name for folder in FOLDERS[1:]]


def package_of(folder: Path) -> str:
    return next((folder / "src").glob("torchweld*")).name


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, zipfile.ZipFile]:
    """The wheel of every distribution by package name: built here, or taken from nox's session."""
    built = os.environ.get("TORCHWELD_WHEELS")
    directory = Path(built) if built else tmp_path_factory.mktemp("wheels")
    if not built:
        pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps"]
        command = [*pip, f"--wheel-dir={directory}", *map(str, FOLDERS)]
        subprocess.run(command, check=True)
    return {path.name.split("-")[0]: zipfile.ZipFile(path) for path in directory.glob("*.whl")}


def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(wheel.read(name).decode())


def requirements(wheel: zipfile.ZipFile) -> set[str]:
    return {Requirement(text).name for text in metadata(wheel).get_all("Requires-Dist", [])}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_wheel_holds_every_file_of_the_package_and_nothing_else(
    folder: Path, wheels: dict[str, zipfile.ZipFile]
) -> None:
    package = package_of(folder)
    expected = {
        path.relative_to(folder / "src").as_posix()
        for path in (folder / "src").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    names = wheels[package].namelist()

    assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_wheel_carries_type_marker_license_and_card(
    folder: Path, wheels: dict[str, zipfile.ZipFile]
) -> None:
    wheel = wheels[package_of(folder)]

    names = {"/".join(Path(name).parts[1:]) for name in wheel.namelist()}

    assert {"py.typed", "licenses/LICENSE"} <= names
    assert str(metadata(wheel).get_payload()).strip() == (folder / "README.md").read_text().strip()


def test_core_wheel_carries_a_page_for_every_code(wheels: dict[str, zipfile.ZipFile]) -> None:
    pages = {path.name for path in (ROOT / "core/src/torchweld/codes").glob("TW*.md")}

    names = {Path(name).name for name in wheels["torchweld"].namelist() if "/codes/" in name}

    assert pages
    assert pages <= names


def test_core_asks_for_no_plugin_and_nothing_that_a_plugin_wraps(
    wheels: dict[str, zipfile.ZipFile],
) -> None:
    assert requirements(wheels["torchweld"]) == {
        "click",
        "importlib-metadata",
        "numpy",
        "packaging",
        "pluggy",
        "safetensors",
        "tensorboard",
        "tomli",  # on Python 3.10
        "torch",
        "tqdm",
    }


@pytest.mark.parametrize("name", PLUGINS)
def test_plugin_asks_for_core_below_its_next_major_version_and_for_no_other_plugin(
    name: str, wheels: dict[str, zipfile.ZipFile]
) -> None:
    asked = [
        Requirement(text)
        for text in metadata(wheels[f"torchweld_{name}"]).get_all("Requires-Dist", [])
    ]

    ours = [str(need) for need in asked if need.name.startswith("torchweld")]

    assert ours == ["torchweld<1,>=0.1"]


@pytest.mark.parametrize("name", PLUGINS)
def test_plugin_registers_itself_under_its_own_name(
    name: str, wheels: dict[str, zipfile.ZipFile]
) -> None:
    wheel = wheels[f"torchweld_{name}"]
    entry_points = next(file for file in wheel.namelist() if file.endswith("entry_points.txt"))

    text = wheel.read(entry_points).decode().split()

    assert text == ["[torchweld]", name, "=", f"torchweld_{name}"]


def test_all_distributions_have_one_version_and_one_range_of_pythons(
    wheels: dict[str, zipfile.ZipFile],
) -> None:
    found = {
        (metadata(wheel)["Version"], metadata(wheel)["Requires-Python"])
        for wheel in wheels.values()
    }

    assert len(found) == 1
    assert found.pop()[1] == ">=3.10"
