"""Everything that has a name in the code has a line in the documentation."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import click
import pytest

from torchweld import hookspecs
from torchweld.claims import Claims
from torchweld.cli import main
from torchweld.components import Component
from torchweld.problems import TITLES
from torchweld.vocabulary import SLOTS, TOKENS

ROOT = Path(__file__).parents[2]
CONTRACTS = (ROOT / "docs" / "contracts.md").read_text("utf-8")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def hook_rows() -> list[str]:
    hooks = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("torchweld_")}
    return [f"| `{name}` | {str(hook.__doc__).splitlines()[0]} |" for name, hook in hooks.items()]


def slot_rows() -> list[str]:
    return [
        f"| `{slot.name}` | {'yes' if slot.exclusive else 'no'} | {slot.edits} | {slot.why} |"
        for slot in SLOTS.values()
    ]


def token_rows() -> list[str]:
    return [
        f"| `{token.name}` | {token.source} | {token.holds} | {token.why} |"
        for token in TOKENS.values()
    ]


def table_under(heading: str) -> list[str]:
    """The rows of the first table below a heading of the contracts page."""
    table = CONTRACTS.partition(f"\n{heading}\n")[2].partition("|---|\n")[2]
    return table.partition("\n\n")[0].splitlines()


@pytest.mark.parametrize(
    ("heading", "rows"),
    [("## Hooks", hook_rows), ("### Slots", slot_rows), ("### Tokens", token_rows)],
)
def test_contracts_page_has_the_rows_of_the_code(
    heading: str, rows: Callable[[], list[str]]
) -> None:
    assert table_under(heading) == rows()


@pytest.mark.parametrize("record", [Component, Claims])
def test_contracts_page_names_every_field(record: type) -> None:
    named = set(re.findall(r"`(\w+)`", CONTRACTS))

    assert {field.name for field in fields(record)} <= named


def test_codes_page_has_the_title_and_the_link_of_every_code() -> None:
    table = "\n".join(
        f"| [{code}](../core/src/torchweld/codes/{code}.md) | {title} |"
        for code, title in TITLES.items()
    )

    assert f"---|\n{table}\n" in (ROOT / "docs" / "codes.md").read_text("utf-8")


def test_trainer_page_has_every_setting_and_every_callback() -> None:
    page = (ROOT / "docs" / "trainer.md").read_text("utf-8")
    names = set(re.findall(r"`(\w+)", page))
    source = (ROOT / "core/src/torchweld/trainer.py").read_text("utf-8")
    trainer = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Trainer")
    init = next(n for n in ast.walk(trainer) if getattr(n, "name", "") == "__init__")
    assert isinstance(init, ast.FunctionDef)
    settings = {argument.arg for argument in init.args.kwonlyargs}
    callbacks = (ROOT / "core/src/torchweld/callbacks/__init__.py").read_text("utf-8")

    assert settings - names == set()
    assert set(re.findall(r'^    "(\w+)",$', callbacks, re.MULTILINE)) - names == set()


def test_commands_page_has_every_command_and_every_option() -> None:
    page = (ROOT / "docs" / "commands.md").read_text("utf-8")
    assert isinstance(main, click.Group)
    sections = {
        name: page.partition(f"\n## torchweld {name}")[2].partition("\n## ")[0]
        for name in main.commands
    }
    options = {
        (name, option)
        for name, command in main.commands.items()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }

    assert [name for name, text in sections.items() if not text] == []
    assert [
        (name, option) for name, option in sorted(options) if option not in sections[name]
    ] == []


@pytest.mark.parametrize(
    "page",
    [
        path
        for path in ROOT.rglob("*.md")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text("utf-8"))

    assert [link for link in links if not (page.parent / link).exists()] == []
