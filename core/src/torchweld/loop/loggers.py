"""Loggers: TensorBoard through torch's own writer; anything with Lightning's method names fits."""

from __future__ import annotations

from collections.abc import Mapping
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


def make_loggers(logger: Any, directory: Path | None) -> list[Any]:
    """Return the loggers for ``logger=``: True, False, one logger or several."""
    if logger is False or (logger is True and directory is None):
        return []
    if logger is True:
        assert directory is not None
        return [TensorBoardLogger(directory)]
    return list(logger) if isinstance(logger, (list, tuple)) else [logger]
