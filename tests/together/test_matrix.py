"""A slice of the matrix every day, all of it in ``soak``; and what the page says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.together.matrix import (
    BEGIN,
    END,
    PAGE,
    TABLES,
    Bench,
    Row,
    cells,
    first,
    page,
    sample,
    title,
)
from tests.together.matrix_choices import STRATEGIES, Cell

ROOT = Path(__file__).parents[2]
NAMED_TEST = re.compile(r"`((?:tests|core)/[\w/]+\.py)(?:::(\w+))?`")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(str(tmp_path_factory.mktemp("beton")))


@pytest.mark.slow
@pytest.mark.parametrize("cell", sample(), ids=title)
def test_verdict_of_the_sample_is_what_happens(cell: Cell, bench: Bench) -> None:
    row = bench.judge(cell)

    assert row.agrees, f"{row.verdict} ({row.why}), {row.happened}"


@pytest.mark.soak
@pytest.mark.parametrize("table", TABLES)
def test_every_verdict_is_what_happens(table: str, bench: Bench) -> None:
    rows = [bench.judge(cell) for cell in cells(table)]

    assert [row for row in rows if not row.agrees] == []


# ---- the judge itself ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_judge_finds_an_ok_that_trains_something_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the wrong loop by hand, a sound run must not pass."""
    of_another = bench._reference(("label_smoothing",), Cell(), None)
    monkeypatch.setattr(Bench, "_reference", lambda *_: of_another)

    row = bench.judge(Cell())

    assert row.verdict == "ok"
    assert not row.agrees


@pytest.mark.slow
def test_the_judge_finds_a_refusal_without_need(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device refuses is tried by hand; ``test_strangers.py`` forces what a plan refuses."""
    monkeypatch.setattr("tests.together.matrix.STRICTER", {})

    row = bench.judge(Cell("single", precision="16"))

    assert (row.verdict, row.agrees) == ("refused", False)
    assert row.happened == "by hand it trains; nothing went wrong"


# ---- the page ------------------------------------------------------------------------------------


def test_the_sample_has_the_articles_stack_under_every_strategy() -> None:
    stacks = [cell for cell in sample() if len(cell.surgeries) == 4]

    assert {cell.strategy for cell in stacks} == set(STRATEGIES)
    assert {cell.precision for cell in stacks} == {"32", "bf16"}


def test_the_page_has_a_row_for_every_cell_and_no_disagreement() -> None:
    text = PAGE.read_text("utf-8")
    generated = text[text.index(BEGIN) : text.index(END)]

    missing = [title(c) for t in TABLES for c in cells(t) if f"| {title(c)} |" not in generated]

    assert missing == []
    assert "(disputed)" not in generated


def test_a_disagreement_is_marked_on_the_page() -> None:
    cell = Cell("fsdp")

    lines = list(page({cell: Row(cell, "ok", "", "trained: 1.0 from by hand", agrees=False)}))

    assert any(f"| {title(cell)} | ok (disputed) |" in line for line in lines)


def test_reasons_are_one_sentence_in_one_line() -> None:
    assert first(["one\n  line", "another"]) == "one line"
    assert first([]) == ""


def named_tests() -> list[tuple[str, str]]:
    return NAMED_TEST.findall(PAGE.read_text("utf-8"))


def test_every_test_that_the_page_names_exists() -> None:
    named = named_tests()

    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).exists()
        or (name and not re.search(rf"def {name}\b", (ROOT / file).read_text("utf-8")))
    ]

    assert len(named) > 60
    assert missing == []
