from __future__ import annotations

import re
import tokenize
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "src" / "torchweld"
FOLDERS = [ROOT / "core", *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
OTHERS = re.compile("deepspeed|fsdp|ffcv|composer", re.IGNORECASE)


def words_of_code(path: Path) -> list[str]:
    """Names and string literals, without comments and docstrings."""
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type != tokenize.NL]
    starts = {
        tokenize.INDENT,
        tokenize.NEWLINE,
        tokenize.ENCODING,
        tokenize.COMMENT,
        tokenize.DEDENT,
    }
    return [
        token.string
        for before, token in pairwise(tokens)
        if token.type == tokenize.NAME
        or (token.type == tokenize.STRING and before.type not in starts)
    ]


def test_words_of_code_leave_out_comments_and_docstrings(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('"""About fsdp."""\n# and ffcv\nname = "deepspeed"\n')

    assert words_of_code(path) == ["name", '"deepspeed"']


def test_core_names_plugins_in_one_table_only() -> None:
    """The table of our own distributions: "did you mean 'fsdp'? it is in torchweld-fsdp"."""
    named = {
        path.relative_to(CORE).as_posix(): sorted(filter(OTHERS.search, words_of_code(path)))
        for path in CORE.rglob("*.py")
    }

    assert len([name for name, words in named.items() if words]) <= 1, named


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_distribution_has_the_same_entries(folder: Path) -> None:
    expected = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "src"}

    assert expected <= {path.name for path in folder.iterdir()}
    assert (ROOT / "tests" / folder.name).is_dir()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_distribution_carries_the_same_license(folder: Path) -> None:
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
