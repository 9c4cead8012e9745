"""``torchweld new-plugin``: the templates of this package, with a name."""

from __future__ import annotations

import datetime as dt
import re
import shutil
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from torchweld.errors import InvalidArgument
from torchweld.spelling import canonical

if TYPE_CHECKING:
    from importlib.abc import Traversable

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*")
_PREFIX = "torchweld-"


def write_plugin(name: str, directory: Path) -> Path:
    """Write the plugin ``name`` into a new folder and return that.

    Args:
        name: as users will write it, with or without ``torchweld-``.
        directory: where the folder is made.

    Raises:
        InvalidArgument: the name cannot be one of a package, or the folder is there already.
    """
    words = _words(name)
    folder = directory / words["distribution"]
    if folder.exists():
        raise InvalidArgument(
            f"{folder} is there already, and nothing is overwritten: choose another name, or "
            "--directory"
        )
    try:
        _copy(resources.files("torchweld") / "templates" / "plugin", folder, words)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InvalidArgument(f"{folder} cannot be written: {error}") from error
    return folder


def next_steps(folder: Path) -> str:
    """What to do with the folder, as commands."""
    lines = [f"cd {folder}", "pip install -e . pytest", "torchweld plugins", "pytest"]
    return "\n".join([f"{folder} is a whole plugin. Next:", *(f"  {line}" for line in lines)])


def _words(name: str) -> dict[str, str]:
    plain = name.removeprefix(_PREFIX)
    if not _NAME.fullmatch(plain):
        raise InvalidArgument(
            f"{name!r} cannot be the name of a package: write letters, digits and single dashes, "
            "the first a letter, as in torchweld new-plugin tidy-relu"
        )
    dashed = canonical(plain)
    distribution = _PREFIX + dashed
    return {
        "name": dashed.replace("-", "_"),
        "entry_point": dashed.replace("-", "_"),
        "distribution": distribution,
        "package": distribution.replace("-", "_"),
        "class_name": "".join(part.capitalize() for part in dashed.split("-")) + "Surgery",
        "year": str(dt.datetime.now(tz=dt.timezone.utc).year),
    }


def _copy(source: Traversable, target: Path, words: dict[str, str]) -> None:
    target.mkdir(parents=True)
    for item in source.iterdir():
        name = item.name.replace("PACKAGE", words["package"]).removesuffix(".in")
        if item.is_dir():
            _copy(item, target / name, words)
        else:
            text = Template(item.read_text("utf-8")).substitute(words)
            (target / name).write_text(text, "utf-8")
