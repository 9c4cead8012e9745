"""The directory of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from torchweld.errors import CheckpointError

if TYPE_CHECKING:
    from torchweld.processes.ranks import Ranks
    from torchweld.setup.flags import Extras


def make_directory(ranks: Ranks, extras: Extras, plan: str) -> Path | None:
    """Make the directory of the run, if anything is to be written; alike on all ranks.

    Args:
        plan: short digest of the plan, a part of the name.

    Raises:
        CheckpointError: it cannot be written.
    """
    if not (extras.checkpointing or extras.writes_into_directory):
        return None
    made = ""
    if ranks.rank == 0:
        name = f"{time.strftime('%m%d-%H%M')}-{plan}"
        made = _make_directory(extras.root, name)
    answer = ranks.exchange("run directory", made)[0]
    if answer.startswith("cannot"):
        raise CheckpointError(
            f"default_root_dir={str(extras.root)!r} {answer}: choose another, or write nothing "
            "with enable_checkpointing=False, logger=False"
        )
    return Path(answer)


def _make_directory(root: Path, name: str) -> str:
    """Make ``root/name`` (with a number if it is taken) and return it, or why it cannot be."""
    for number in range(1, 1000):
        directory = root / (name if number == 1 else f"{name}-{number}")
        try:
            directory.mkdir(parents=True)
            probe = directory / ".probe"
            probe.write_bytes(b"x")
            probe.unlink()
        except FileExistsError:
            if not directory.is_dir():
                return f"cannot be made: {directory} is a file"
            continue
        except OSError as error:
            return f"cannot be written: {error}"
        return str(directory)
    return "cannot be made: there are a thousand runs of this minute"
