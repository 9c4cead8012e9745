"""Loggers: TensorBoard through torch's own writer; anything with Lightning's method names fits."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import (  # type: ignore[import-untyped]  # generated
    Summary,
)
from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger:
    """Writes scalars to ``directory`` for ``tensorboard --logdir``."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._writer = SummaryWriter(log_dir=str(directory))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write all metrics as one event.

        ``add_scalar`` writes an event for each, which took most of the time of a border.
        """
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer._get_file_writer().add_summary(Summary(value=values), step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Write the run's hyper-parameters as text."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in params.items())
        self._writer.add_text("hparams", f"| name | value |\n| --- | --- |\n{rows}")

    def finalize(self, status: str) -> None:
        """Flush and close; ``status`` is ``"success"`` or ``"failed"``."""
        self._writer.close()


class CSVLogger:
    """Writes ``metrics.csv``, a row for each log, and ``hparams.json``.

    A metric that comes up later makes a new column, for which all rows are written anew.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._file = self.path  # made once: joining paths costs a dozen calls
        self._columns: list[str] = ["step"]
        self._rows: list[dict[str, float]] = []

    @property
    def path(self) -> Path:
        """The file of the metrics."""
        return self.directory / "metrics.csv"

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a row."""
        row = {"step": step, **metrics}
        self._rows.append(row)
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._write_anew()
        else:
            with self._file.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file).writerow([row.get(name, "") for name in self._columns])

    def _write_anew(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._file.open("w", encoding="utf-8", newline="") as file:
            rows = [[row.get(name, "") for name in self._columns] for row in self._rows]
            csv.writer(file).writerows([self._columns, *rows])

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Write the run's hyper-parameters."""
        self.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(params), indent=2, default=str)
        (self.directory / "hparams.json").write_text(text + "\n", "utf-8")


LOGGERS: Mapping[str, Callable[[Path], Any]] = {"tensorboard": TensorBoardLogger, "csv": CSVLogger}
"""What a name in ``logger=`` makes in the directory of the run."""


def make_loggers(logger: Any, directory: Path | None) -> list[Any]:
    """Return the loggers for ``logger=``: True, False, a name, one logger or several."""
    loggers: list[Any] = []
    for one in logger if isinstance(logger, (list, tuple)) else [logger]:
        if one is True or isinstance(one, str):
            assert directory is not None or one is True
            name = "tensorboard" if one is True else one
            loggers += [] if directory is None else [LOGGERS[name](directory)]
        elif one is not False:
            loggers.append(one)
    return loggers
