"""What a run prints: a header, what was done to the model, one line an epoch, a moving bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from torchweld.interfaces import Progress
    from torchweld.loop.timetable import Timetable

_REFRESH_SECONDS = 0.5
_HIDDEN = frozenset({
    "epoch", "lr", "samples_per_second", "grad_norm", "memory_gib", "momentum", "weight_decay",
})  # fmt: skip


class Console:
    """Prints on rank 0; elsewhere, and with ``quiet``, it says nothing but warnings of rank 0.

    Args:
        speaks: whether this rank prints at all.
        quiet: print warnings only.
        bar: show a moving bar, where the output is a terminal.

    Attributes:
        moves: whether there is a bar to be refreshed.
    """

    def __init__(self, *, speaks: bool, quiet: bool = False, bar: bool = True) -> None:
        self._speaks, self._quiet = speaks, quiet or not speaks
        self._wants_bar = bar and not self._quiet
        self.moves = self._wants_bar and sys.stderr.isatty()
        self._held: list[str] | None = []  # lines of the set-up, until the first line is known
        self._bar: tqdm[Any] | None = None
        self._table: Timetable | None = None
        self._rate = 0.0  # steps a second, as of the last border
        self._last = (0.0, 0)

    def open(self, headline: str) -> None:
        """Print the first line of the run, then what was said before it."""
        held, self._held = [headline, *(self._held or ())], None
        for line in held:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line of the run's own."""
        if self._quiet:
            return
        if self._held is not None:
            self._held.append(line)
        else:
            self._write(line)

    def warn(self, line: str) -> None:
        """Print what the user should know and may act on."""
        if self._speaks:
            self._write(f"warning: {line}")

    def _write(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    # ---- the bar ---------------------------------------------------------------------------------

    def start(self, table: Timetable, progress: Progress) -> None:
        """Begin to follow a run."""
        self._table = table
        self._last = (time.monotonic(), progress.step)

    def next_refresh(self, step: int) -> int | None:
        """The step at which the bar should move next; None where there is none to move."""
        if not self.moves:
            return None
        return step + max(1, int(self._rate * _REFRESH_SECONDS))

    def refresh(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Move the bar to ``progress``, where it moves."""
        now, (then, step) = time.monotonic(), self._last
        if progress.step > step and now > then:
            self._rate = (progress.step - step) / (now - then)
        self._last = (now, progress.step)
        if self._bar is None:
            self._bar = tqdm(
                total=progress.steps_per_epoch, leave=False, unit="step", dynamic_ncols=True
            )
        shift = self._table.shift if self._table is not None else 0
        done = progress.step - shift - progress.epoch * (progress.steps_per_epoch or 0)
        self._bar.set_description(f"epoch {self._epoch(progress.epoch)}", refresh=False)
        self._bar.set_postfix(_shown(metrics), refresh=False)
        self._bar.update(done - self._bar.n)

    def end_epoch(self, progress: Progress, metrics: Mapping[str, float], note: str = "") -> None:
        """Leave one line for the epoch that has ended."""
        self.clear()
        if not self._wants_bar:
            return
        steps = f"{progress.step} steps"
        if progress.steps_per_epoch is not None:
            steps = f"{progress.steps_per_epoch}/{progress.steps_per_epoch}"
        parts = [f"epoch {self._epoch(progress.epoch - 1)}", steps]
        if "samples_per_second" in metrics:
            parts.append(f"{metrics['samples_per_second']:,.0f} samples/s".replace(",", " "))
        means = {n.removesuffix("/epoch"): v for n, v in metrics.items() if n.endswith("/epoch")}
        parts += [f"{name} {value}" for name, value in _shown({**metrics, **means}).items()]
        self.say("   ".join([*parts, note] if note else parts))

    def clear(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _epoch(self, index: int) -> str:
        epochs = self._table.max_epochs if self._table is not None else None
        return f"{index + 1}/{epochs}" if epochs is not None else str(index + 1)


def _shown(metrics: Mapping[str, float]) -> dict[str, str]:
    return {
        name.removeprefix("train_").replace("_", " "): f"{value:.3g}"
        if abs(value) >= 1000
        else f"{value:.3f}"
        for name, value in metrics.items()
        if name.partition("/")[0] not in _HIDDEN and not name.endswith("/epoch")
    }
