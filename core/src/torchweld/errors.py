"""Every exception of torchweld.

TorchweldError
├── InvalidArgument      an argument of a public function; also a ValueError
├── PlanError            what the plan found; carries every problem, raised once
├── PluginError          a plugin's own code raised; names the plugin and what it was doing
├── SurgeryError         a surgery changed what it did not claim, or nothing under strict=True
├── RunError             the run cannot go on: an empty loader, a loss that is no scalar, …
│   └── LoopError        the own loop was used in a way that would train wrongly
├── RankError            another process of this run
│   ├── RanksDisagree    the processes would train different things; carries the difference
│   ├── RankMissing      a process never arrived; names it
│   └── RankFailed       another process stopped first; carries its first cause
└── CheckpointError      a checkpoint cannot be written, found or resumed
    └── CheckpointDamaged    a file of it is missing, truncated or changed; names the file

Preempted                a signal asked the run to end, which it did; a SystemExit, no error
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchweld.problems import Problem


class TorchweldError(Exception):
    """Base of all errors that torchweld raises on purpose."""


class InvalidArgument(TorchweldError, ValueError):
    """An argument of a public function has a value that cannot work."""


class PlanError(TorchweldError):
    """The choices cannot run together.

    Attributes:
        problems: every error of the plan, not only the first.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class PluginError(TorchweldError):
    """Code of a plugin raised; the message names the plugin, the cause is chained."""


class SurgeryError(TorchweldError):
    """A surgery did something else than it claims."""


class RunError(TorchweldError):
    """The run cannot start or go on."""


class LoopError(RunError):
    """The own loop was used in a way that would train wrongly without a word."""


class RankError(TorchweldError):
    """Something about another process of this run."""


class RanksDisagree(RankError):
    """The processes of this run would do different things."""


class RankMissing(RankError):
    """A process of this run did not arrive in time."""


class RankFailed(RankError):
    """Another process of this run stopped first."""


class CheckpointError(TorchweldError):
    """A checkpoint cannot be written, found or resumed."""


class CheckpointDamaged(CheckpointError):
    """A file of a checkpoint is missing, truncated or changed."""


class Preempted(SystemExit):
    """A signal asked the run to end, and it ended at a border; not an error, so not among them.

    Attributes:
        code: the exit code of a script that lets it pass: 75 (EX_TEMPFAIL: start it again, it goes
            on with ``ckpt_path="last"``), or 143 where the run writes no checkpoints.
    """
