"""Every pair of first-party components: what the plan says of it, and what happens.

``python -m tests.together.matrix`` runs all of them and writes the first part of
``docs/compatibility.md`` anew; ``nox -s matrix`` does that in an environment with everything.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.together.matrix_choices import (
    ELSEWHERE,
    IN_TEXT_TOO,
    OF_TEXT,
    SETTINGS,
    STRATEGIES,
    SURGERIES,
    Cell,
)
from tests.together.matrix_runs import Outcome, by_hand, by_trainer
from torchweld.testing import RanksFailed, run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
PRECISIONS = ("32", "bf16", "bf16-true")
SECONDS = 120.0
FORCED_SECONDS = 90.0
"""A run that was forced against the plan may wait for ever."""

TOLERANCES = {"32": 1e-4, "bf16": 2e-2, "bf16-true": 1e-1, "16": 2e-2}
"""How far weights may end from the reference, as a share of the way that training moved them.

Rounding in another order is about 1e-6 in fp32. In bf16 a value has 8 bits, and strategies add
gradients up in another order; bf16-true rounds the weights themselves, where DeepSpeed keeps an
fp32 copy.
"""
VAL_TOLERANCES = {"32": 1e-4, "bf16": 2e-2, "bf16-true": 1e-1, "16": 2e-2}

STRICTER: dict[tuple[str, ...], str] = {
    (
        "16",
    ): "stricter than needed: torch scales losses on a CPU too, where fp16 gains nothing over bf16",
}
"""Pairs that are refused though nothing goes wrong in such a run, and why they stay refused."""

TWO_MIXERS = "test_two_mixers_train_on_wrong_targets"
WRONG_TARGETS: dict[tuple[str, str], str] = {
    ("cutmix", "mixup"): TWO_MIXERS,
    ("cutmix by loss", "mixup"): TWO_MIXERS,
    (
        "label_smoothing",
        "cutmix by loss",
    ): "test_mixing_losses_under_smoothing_leaves_half_of_it_out",
}
"""Pairs whose loop by hand is as wrong, and the test in ``tests/composer/test_rules.py``."""


@dataclass(frozen=True)
class Row:
    """One cell of the matrix.

    Attributes:
        cell: what was chosen.
        verdict: ok, ordered, adjusted or refused.
        why: the plan's reason, one sentence.
        happened: what became of it, one clause.
        agrees: the verdict is what happened.
    """

    cell: Cell
    verdict: str
    why: str
    happened: str
    agrees: bool


@dataclass
class Bench:
    """Runs cells, each reference once.

    Attributes:
        cache: where datasets are kept that were converted.
        references: what came of the loops by hand.
    """

    cache: str
    references: dict[Any, Outcome | str] = field(default_factory=dict)

    def judge(self, cell: Cell) -> Row:
        """Plan and train a cell; force it where it is refused."""
        found = attempt(partial(by_trainer, cell, self.cache), cell.world_size, SECONDS)
        if isinstance(found, str):
            return Row(cell, "failed", "", found, False)
        if found.verdict == "refused":
            return self._forced(cell, found)
        apart, close = self._apart(cell, found)
        if not found.same_plan:
            return Row(cell, found.verdict, "", "another listing is another plan", False)
        if found.verdict == "ordered" and len(found.order) == 2:
            apart += f"; the other way round {self._reversed(cell, found)}"
        return Row(cell, found.verdict, first(found.why), f"trained: {apart}", close)

    def _forced(self, cell: Cell, refused: Outcome) -> Row:
        keys: tuple[str, ...] = refused.keys
        for _ in range(3):  # with the model, or at set-up, more may be found
            job = partial(by_trainer, cell, self.cache, keys)
            forced = attempt(job, cell.world_size, FORCED_SECONDS)
            if isinstance(forced, str) or forced.verdict != "refused":
                break
            keys += forced.keys
        row = partial(Row, cell, "refused", first(refused.why))
        if not keys:
            return self._refused_by_device(cell, refused)
        if isinstance(forced, str):
            return row(f"forced: {forced}", True)
        if forced.verdict == "refused":
            return row(f"cannot be forced: {first(forced.why)}", True)
        apart, close = self._apart(cell, forced)
        if not close:
            return row(f"forced: {apart}", True)
        said = known(cell)
        return row(f"forced: {apart}; {said or 'nothing went wrong'}", bool(said))

    def _refused_by_device(self, cell: Cell, refused: Outcome) -> Row:
        """What cannot be forced: the loop by hand shows what it would come to."""
        found = self._reference(cell.surgeries, cell, None)
        row = partial(Row, cell, "refused", first(refused.why))
        if isinstance(found, str):
            return row(f"by hand: {found}", True)
        said = known(cell)
        return row(f"by hand it trains; {said or 'nothing went wrong'}", bool(said))

    def _apart(self, cell: Cell, found: Outcome) -> tuple[str, bool]:
        """How far from the reference, as text, and whether that is close enough."""
        reference = self._reference(found.order, cell, found.clip)
        if isinstance(reference, str):
            return f"by hand: {reference}", False
        share, loss = distance(found, reference)
        close = share <= TOLERANCES[cell.precision] and loss <= VAL_TOLERANCES[cell.precision]
        text = "the same bits as by hand" if share == 0 else f"{share:.1e} from by hand"
        return (text if close else f"{share:.1e} from by hand, loss {loss:.1e}"), close

    def _reversed(self, cell: Cell, found: Outcome) -> str:
        right = self._reference(found.order, cell, found.clip)
        wrong = self._reference(found.order[::-1], cell, found.clip)
        if isinstance(wrong, str):
            return f"by hand: {wrong}"
        assert isinstance(right, Outcome)
        if wrong.weights.keys() != right.weights.keys():
            return "it is another model"
        return f"{distance(wrong, right)[0]:.1e} away"

    def _reference(self, order: Sequence[str], cell: Cell, clip: float | None) -> Outcome | str:
        setting = cell.setting if cell.setting == "sync_batchnorm" else ""
        alike = replace(cell, strategy="", data="", surgeries=tuple(order), setting=setting,
                        processes=cell.world_size)  # fmt: skip
        key = (alike, clip)
        if key not in self.references:
            job = partial(by_hand, alike, clip)
            self.references[key] = attempt(job, cell.world_size, SECONDS)
        return self.references[key]


def attempt(job: Callable[[], Outcome], world_size: int, seconds: float) -> Outcome | str:
    """What rank 0 returns, or in one line why a rank failed first."""
    try:
        outcomes = run_ranks(job, world_size, timeout_seconds=seconds)
    except RanksFailed as failed:
        message = " ".join(failed.failures[0].message.split())
        return message if len(message) <= 160 else message[:157] + "..."
    found: Outcome = outcomes[0]
    return found


def distance(found: Outcome, reference: Outcome) -> tuple[float, float]:
    """Between the weights, as a share of the way that training moved them; and of the losses."""
    start, goal = reference.start, reference.weights
    if not goal.keys() <= found.weights.keys():
        return float("inf"), float("inf")
    moved = sum(float((goal[name] - start[name]).double().pow(2).sum()) for name in goal)
    apart = sum(float((goal[name] - found.weights[name]).double().pow(2).sum()) for name in goal)
    losses = [(found.val_loss, reference.val_loss)]
    if found.average_loss is not None and reference.average_loss is not None:
        losses.append((found.average_loss, reference.average_loss))
    loss = max(abs(one - other) for one, other in losses)
    # A value that is no number is as far as can be.
    share = (apart / moved) ** 0.5
    return share if share == share else float("inf"), loss if loss == loss else float("inf")  # noqa: PLR0124


def known(cell: Cell) -> str:
    """What is known of a refusal that ends like the loop by hand, or nothing."""
    words = {cell.strategy, cell.strategy.split(" ")[0], cell.data, cell.precision, cell.setting,
             *cell.surgeries}  # fmt: skip
    for pair, test in WRONG_TARGETS.items():
        if set(pair) <= words:
            return f"both train on wrong targets, `tests/composer/test_rules.py::{test}`"
    return next((why for pair, why in STRICTER.items() if set(pair) <= words), "")


def first(sentences: Sequence[str]) -> str:
    """The first sentence, in one line."""
    return " ".join(sentences[0].split()) if sentences else ""


# ---- which cells ---------------------------------------------------------------------------------

FOUR = ("channels_last", "label_smoothing", "cutmix", "blurpool")
TABLES = (
    "strategy and data",
    "strategy and precision",
    "strategy and surgery",
    "strategy and setting",
    "strategies of GPUs",
    "data and surgery",
    "data and precision",
    "surgery and precision",
    "surgery and compilation",
    "two surgeries",
    "cast weights",
    "the article's stack",
)


def cells(table: str) -> Iterator[Cell]:
    """All pairs of two axes.

    What is not named is ``ddp`` in two processes, ``torch``, no surgery and fp32.
    """
    pairs: dict[str, Iterable[Cell]] = {
        "strategy and data": (Cell(s, d) for s in STRATEGIES for d in ("torch", "ffcv")),
        "strategy and precision": (
            Cell(s, precision=p) for s in STRATEGIES for p in (*PRECISIONS[1:], "16")
        ),
        "strategy and surgery": (
            Cell(s, surgeries=(one,)) for s in STRATEGIES for one in SURGERIES
        ),
        "strategy and setting": (Cell(s, setting=t) for s in STRATEGIES for t in SETTINGS),
        "strategies of GPUs": (
            cell
            for s in ELSEWHERE
            for cell in (
                *(Cell(s, precision=p) for p in PRECISIONS),
                Cell(s, surgeries=("ema",)),
                *(Cell(s, "ffcv", FOUR, p) for p in PRECISIONS[:2]),
            )
        ),
        # There are no pictures in text.
        "data and surgery": (
            Cell(data="ffcv", surgeries=(one,)) for one in SURGERIES if one not in OF_TEXT
        ),
        "data and precision": (Cell(data="ffcv", precision=p) for p in PRECISIONS[1:]),
        "surgery and precision": (
            Cell(surgeries=(one,), precision=p) for one in SURGERIES for p in PRECISIONS[1:]
        ),
        "surgery and compilation": (
            Cell("single", surgeries=(one,), setting="compile") for one in SURGERIES
        ),
        # What two surgeries do to each other does not depend on the strategy.
        "two surgeries": (
            Cell("single", surgeries=pair)
            for pair in itertools.combinations(SURGERIES, 2)
            if may_meet(*pair)
        ),
        # What depends on three: buffers of a surgery under each way of casting weights, and a
        # model without BatchNorm.
        "cast weights": (
            Cell(s, surgeries=(one,), precision="bf16-true")
            for one in ("blurpool", "alibi", "gated_linear_units")
            for s in STRATEGIES
        ),
        "the article's stack": (
            Cell(s, "ffcv", FOUR, p) for s in STRATEGIES for p in PRECISIONS[:2]
        ),
    }
    yield from pairs[table]


def may_meet(one: str, other: str) -> bool:
    """Whether two keys are two algorithms, not one with other arguments, that have one task."""
    if SURGERIES[one][0] == SURGERIES[other][0]:
        return False
    text = [name in OF_TEXT for name in (one, other)]
    return all(text) or not any(text) or bool({one, other} & set(IN_TEXT_TOO))


def sample(part: int = 29) -> list[Cell]:
    """A slice for every day: the named four under every strategy, and each so many-th pair."""
    everything = [cell for table in TABLES[:-1] for cell in cells(table)]
    return [*cells(TABLES[-1]), *everything[::part]]


# ---- the page ------------------------------------------------------------------------------------


def main() -> None:
    """Run the matrix and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="JSON lines to go on from and to add to")
    parser.add_argument("--tables", nargs="*", default=TABLES, help="which tables to run")
    parser.add_argument("--write", action="store_true", help="only write the page from --results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = options.results or Path(folder) / "results.jsonl"
        if not options.write:
            run_tables(options.tables, results, folder)
        write_page(read_rows(results))


def run_tables(tables: Sequence[str], results: Path, folder: str) -> None:
    """Run what has no row yet."""
    bench, done = Bench(folder), set(read_rows(results))
    for table in tables:
        for cell in cells(table):
            if cell in done:
                continue
            begun = time.monotonic()
            row = bench.judge(cell)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            mark = "" if row.agrees else "   <-- DISAGREES"
            print(f"{time.monotonic() - begun:5.1f} s  {title(cell)}: {row.verdict}, "
                  f"{row.happened}{mark}", flush=True)  # fmt: skip


def read_rows(results: Path) -> dict[Cell, Row]:
    """Rows by cell, the newest of each."""
    rows: dict[Cell, Row] = {}
    for line in results.read_text("utf-8").splitlines() if results.exists() else ():
        data = json.loads(line)
        chosen = data.pop("cell")
        cell = Cell(**{**chosen, "surgeries": tuple(chosen["surgeries"])})
        rows[cell] = Row(cell, **data)
    return rows


def title(cell: Cell) -> str:
    """A cell in words, without what is as usual."""
    words = [cell.strategy, cell.data, *cell.surgeries, cell.precision, cell.setting]
    return " + ".join(word for word in words if word)


def write_page(rows: dict[Cell, Row]) -> None:
    """Replace the generated part of the page."""
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    generated = "\n".join([BEGIN, "", *page(rows), END])
    PAGE.write_text(before + generated + after, "utf-8")


def page(rows: dict[Cell, Row]) -> Iterator[str]:
    """Lines of the generated part."""
    names = [
        "torch",
        "torchvision",
        "mosaicml",
        "deepspeed",
        "fairscale",
        "ffcv",
        "transformers",
        "numpy",
    ]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    wrong = [row for row in rows.values() if not row.agrees]
    strict = [row for row in rows.values() if "stricter than needed" in row.happened]
    yield (
        f"Run on {time.strftime('%Y-%m-%d')} with Python {platform.python_version()}, {versions}; "
        f"{platform.machine()} CPU, gloo, two processes (`single`: one). {len(rows)} runs; in "
        f"{len(rows) - len(wrong)} the verdict is what happened, of which {len(strict)} are "
        "refused although nothing goes wrong when they are forced, or run by hand where they "
        "cannot be: stricter than needed, each with why."
    )
    yield ""
    yield from grid(rows)
    for table in TABLES:
        found = [rows[cell] for cell in cells(table) if cell in rows]
        yield f"### {table.capitalize()}"
        yield ""
        yield "| choice | verdict | what happened | why |"
        yield "|---|---|---|---|"
        yield from (
            f"| {title(row.cell)} | {row.verdict}{'' if row.agrees else ' (disputed)'} "
            f"| {cleaned(row.happened)} | {cleaned(row.why)} |"
            for row in found
        )
        yield ""


def grid(rows: dict[Cell, Row]) -> Iterator[str]:
    """The verdicts of every surgery under every strategy, at one glance."""
    yield f"| surgery | {' | '.join(STRATEGIES)} |"
    yield "|---|" + "---|" * len(STRATEGIES)
    for one in SURGERIES:
        found = (rows.get(Cell(name, surgeries=(one,))) for name in STRATEGIES)
        yield f"| {one} | {' | '.join(row.verdict if row else '' for row in found)} |"
    yield ""


def cleaned(text: str) -> str:
    """Fit for one cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
