"""Import ffcv, or say in one sentence what is missing and which command brings it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torchweld.errors import PluginError

INSTALL = "pip install 'torchweld-ffcv[ffcv]'"
LIBRARIES = {"opencv4": "OpenCV", "libturbojpeg": "libjpeg-turbo"}
"""Name for pkg-config, and the name people know."""

COMPILERS = ("g++", "c++", "clang++")
HEADERS = "Python.h (with the Python of Debian or Ubuntu itself: python3-dev)"

PACKAGES = {
    "apt": "apt-get install -y pkg-config libopencv-dev libturbojpeg0-dev g++",
    "conda": "conda install -c conda-forge pkg-config opencv libjpeg-turbo compilers",
    "brew": "brew install pkg-config opencv jpeg-turbo",
}
"""What installs the system libraries that ffcv is compiled against, by package manager."""


def ffcv_module(name: str = "ffcv") -> ModuleType:
    """Import and return a module of ffcv: ``ffcv_module("ffcv.fields")``.

    The first import takes 0.3 s instead of 4 s: one module of ffcv makes a ``numba.typed.Dict``
    when it is imported, which compiles; a dict does the same there.

    Raises:
        PluginError: ffcv, or a library that it is linked to, is missing; says what brings it.
    """
    loaded = sys.modules.get(name)
    if loaded is not None:
        return loaded
    top = name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise PluginError(missing_module(top))
    try:
        with _plain_dicts(), _threads_kept():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise PluginError(missing_module(error.name or name)) from error
    except (ImportError, OSError) as error:  # the linker's words for a shared library
        raise PluginError(
            f"ffcv is installed, but a library that it was compiled against is missing or another "
            f"one now ({error}); install it ({package_line()}) and build ffcv again: "
            "pip install --force-reinstall --no-deps --no-cache-dir ffcv==1.0.2"
        ) from error


def missing_module(module: str) -> str:
    """One sentence: what is missing and how to install it, system packages first."""
    if module == "distutils":
        return f"ffcv imports distutils, which setuptools brings on Python 3.12: {INSTALL}"
    lacking = missing_to_compile()
    if not lacking:
        return f"the data source ffcv needs the module {module!r}, which is missing: {INSTALL}"
    named = " and ".join(filter(None, [", ".join(lacking[:-1]), lacking[-1]]))
    return (
        f"the data source ffcv needs the module {module!r}, which is missing, and to compile it "
        f"{named}: {package_line()} && {INSTALL}"
    )


def missing_to_compile() -> list[str]:
    """What ffcv is compiled with, or against, and this machine has not."""
    chosen = shlex.split(os.environ.get("CXX", ""))[:1]  # conda's have other names, and set this
    has_compiler = any(map(shutil.which, [*chosen, *COMPILERS]))
    has_headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
    return [
        *_missing_libraries(),
        *([] if has_compiler else ["a C++ compiler"]),
        *([] if has_headers else [HEADERS]),
    ]


def package_line() -> str:
    """The command for the package manager of this machine, or all of them."""
    managers = {"apt": "apt-get", "conda": "conda", "brew": "brew"}
    here = [name for name, program in managers.items() if shutil.which(program)]
    return " or ".join(PACKAGES[name] for name in (here or PACKAGES))


def _missing_libraries() -> list[str]:
    if shutil.which("pkg-config") is None:
        return ["pkg-config", *LIBRARIES.values()]
    return [known for name, known in LIBRARIES.items() if not _pkg_config_finds(name)]


def _pkg_config_finds(library: str) -> bool:
    found = subprocess.run(["pkg-config", "--exists", library], check=False, capture_output=True)
    return found.returncode == 0


@contextmanager
def _plain_dicts() -> Iterator[None]:
    """While ffcv is imported, ``numba.typed.Dict`` is ``dict``.

    ``ffcv/fields/rgb_image.py`` (1.0.2) holds two numbers in one; pipelines read them while they
    are made, not in compiled code.
    """
    typed = importlib.import_module("numba.typed")
    original = typed.Dict
    typed.Dict = dict  # type: ignore[attr-defined]  # a module's name, for the time of an import
    try:
        yield
    finally:
        typed.Dict = original  # type: ignore[attr-defined]  # as above


@contextmanager
def _threads_kept() -> Iterator[None]:
    """While ffcv is imported, nothing sets a number of threads.

    ``ffcv/pipeline/compiler.py`` (1.0.2) sets torch's to 1 when it is imported, and numba's, which
    starts numba's threads: with some threading layers a process that has them cannot fork.
    """
    torch, numba = importlib.import_module("torch"), importlib.import_module("numba")
    threads, set_num_threads = torch.get_num_threads(), numba.set_num_threads
    numba.set_num_threads = lambda _count: None  # type: ignore[attr-defined]  # during the import
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        numba.set_num_threads = set_num_threads  # type: ignore[attr-defined]  # as above
        compiler = sys.modules.get("ffcv.pipeline.compiler")
        if compiler is not None:  # it has a name of its own for the function
            compiler.set_num_threads = set_num_threads  # type: ignore[attr-defined]  # as above
