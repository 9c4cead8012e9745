from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from torchweld_ffcv.install import PACKAGES, ffcv_module, missing_to_compile, package_line

if TYPE_CHECKING:
    import pytest

WITHOUT_FFCV = """
import sys
sys.modules["ffcv"] = None  # as Python marks a module that cannot be imported
from torchweld.errors import PluginError
from torchweld_ffcv.install import ffcv_module
try:
    ffcv_module("ffcv")
except PluginError as error:
    print(error)
"""


def said_without_ffcv(path: Path) -> str:
    """What is said where ffcv cannot be imported and only ``path`` has programs."""
    words = [sys.executable, "-c", WITHOUT_FFCV]
    environ = {**os.environ, "PATH": str(path), "CXX": ""}
    return subprocess.run(words, env=environ, check=True, capture_output=True, text=True).stdout


def program(directory: Path, name: str, code: int) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\nexit {code}\n")
    (directory / name).chmod(0o755)


def test_missing_ffcv_names_the_system_packages_of_this_machine(tmp_path: Path) -> None:
    program(tmp_path / "bin", "pkg-config", 1)
    program(tmp_path / "bin", "apt-get", 0)

    said = said_without_ffcv(tmp_path / "bin")

    assert "needs the module 'ffcv', which is missing, and to compile it OpenCV, " in said
    assert "libjpeg-turbo and a C++ compiler: " in said
    assert f"{PACKAGES['apt']} && pip install 'torchweld-ffcv[ffcv]'" in said
    assert "conda" not in said


def test_missing_ffcv_with_all_libraries_needs_pip_alone(tmp_path: Path) -> None:
    program(tmp_path / "bin", "pkg-config", 0)
    program(tmp_path / "bin", "g++", 0)

    said = said_without_ffcv(tmp_path / "bin")

    assert said.endswith("which is missing: pip install 'torchweld-ffcv[ffcv]'\n")


def test_unknown_machine_is_told_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    assert package_line() == " or ".join(PACKAGES.values())
    assert missing_to_compile() == ["pkg-config", "OpenCV", "libjpeg-turbo", "a C++ compiler"]


def test_compiler_of_the_environment_and_headers_of_python_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pkg-config", "conda-c++"):
        program(tmp_path, name, 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "conda-c++ -pipe")

    there = missing_to_compile()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    gone = missing_to_compile()

    assert there == []
    assert [word.split()[0] for word in gone] == ["Python.h"]


def test_import_of_ffcv_leaves_numba_as_it_was() -> None:
    import numba.typed

    before = numba.typed.Dict

    module = ffcv_module("ffcv.fields.rgb_image")

    assert numba.typed.Dict is before
    assert dict(module.IMAGE_MODES) == {"jpg": 0, "raw": 1}


def test_library_that_is_gone_is_named(tmp_path: Path) -> None:
    package = tmp_path / "ffcv"
    package.mkdir()
    (package / "__init__.py").write_text("import ffcv._libffcv\n")
    (package / "_libffcv.so").write_bytes(b"no library")
    script = WITHOUT_FFCV.replace(
        'sys.modules["ffcv"] = None', f"sys.path.insert(0, {str(tmp_path)!r})"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )

    assert "a library that it was compiled against is missing or another one now" in done.stdout
    assert "--force-reinstall" in done.stdout


DOCTOR = """
import sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
missing = sys.argv[1:]
PathFinder.find_spec = lambda name, *more: None if name in missing else found(name, *more)
from click.testing import CliRunner
from torchweld.cli import main
result = CliRunner().invoke(main, ["doctor"])
print(result.output, [name for name in ("ffcv", "cv2", "torch") if name in sys.modules])
"""


def doctor(*missing: str, path: Path | None = None) -> str:
    """What ``torchweld doctor`` says where these modules are missing."""
    words = [sys.executable, "-c", DOCTOR, *missing]
    environ = {
        **os.environ,
        **({"PATH": str(path), "CXX": ""} if path else {}),
        "TORCHWELD_DISABLE": "",
    }
    return subprocess.run(words, env=environ, check=True, capture_output=True, text=True).stdout


def test_doctor_has_nothing_to_say_where_all_is_there() -> None:
    said = doctor()

    assert "pip install 'torchweld-ffcv" not in said
    assert said.endswith("[]\n")  # and has imported neither ffcv nor torch for it


def test_doctor_names_what_is_missing_and_the_packages_of_every_system(tmp_path: Path) -> None:
    program(tmp_path / "bin", "pkg-config", 1)

    said = doctor("ffcv", path=tmp_path / "bin")

    assert "is missing, and to compile it OpenCV, libjpeg-turbo and a C++ compiler" in said
    for manager, command in PACKAGES.items():
        assert f"{manager}: {command}" in said


def test_doctor_names_a_module_that_ffcv_needs() -> None:
    assert "needs the module 'numba', which is missing: pip install" in doctor("numba")
