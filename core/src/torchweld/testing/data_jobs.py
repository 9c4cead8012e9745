"""What the ranks of the data suite do: build a loader as core does, and tell what it yields."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchweld import rng
from torchweld.checkpoint import encode
from torchweld.components import Use
from torchweld.interfaces import Loader, LoaderRequest
from torchweld.nesting import map_tensors
from torchweld.planning import make_plan
from torchweld.processes.ranks import launch
from torchweld.testing.registry import empty_registry

if TYPE_CHECKING:
    from torchweld.testing.data import DataSourceConformance


@dataclass(frozen=True)
class SourceCase:
    """One split of one data source.

    Attributes:
        suite: has the component and makes the data.
    """

    suite: DataSourceConformance
    train: bool = True
    seed: int = 5
    epoch: int = 0
    sample_transforms: Sequence[Callable[[Any], Any]] = ()


@dataclass
class Reading:
    """One epoch as one rank read it.

    Attributes:
        batches: sample numbers of each batch, padding left out.
        counts: ``samples(batch)`` of each.
    """

    sharded: bool
    num_batches: int | None
    num_samples: int | None
    batches: list[list[int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def samples(self) -> list[int]:
        """Sample numbers of the epoch, in order."""
        return [sample for batch in self.batches for sample in batch]


@contextmanager
def loader_of(case: SourceCase, num_samples: int) -> Iterator[Loader]:
    """Build the loader of a split, after the launch and with a process group, as core does."""
    ranks = launch("cpu")
    if ranks.world_size > 1:
        ranks.join({"cpu": "gloo"})
    choice = Use(case.suite.component, case.suite.options)
    plan = make_plan(empty_registry(), strategy="ddp", data=choice)
    errors = [f"{p.code} {p.what}. {p.why}" for p in plan.problems if p.severity == "error"]
    assert plan.data is not None and not errors, f"the component cannot be planned: {errors}"
    request = LoaderRequest(
        data=case.suite.make_data(num_samples),
        train=case.train,
        env=ranks.env,
        seed=case.seed,
        sample_transforms=case.sample_transforms,
    )
    with closing(plan.data.make().build(request)) as loader:
        yield loader


def read(case: SourceCase, loader: Loader, epoch: int = 0, start: int = 0) -> Reading:
    """Read one epoch, from a batch on."""
    reading = Reading(loader.sharded, loader.num_batches, loader.num_samples)
    loader.set_epoch(epoch, start)
    for batch in loader:
        real = loader.samples(batch)
        reading.counts.append(real)
        reading.batches.append(case.suite.identify(batch)[:real])
    return reading


# ---- jobs ----------------------------------------------------------------------------------------


def read_epoch(case: SourceCase, num_samples: int) -> Reading:
    """Read the epoch of the case."""
    with loader_of(case, num_samples) as loader:
        return read(case, loader, case.epoch)


def read_sizes(case: SourceCase, sizes: Sequence[int]) -> list[Reading]:
    """Read an epoch of data of each size."""
    return [read_epoch(case, num_samples) for num_samples in sizes]


def read_twice(case: SourceCase, num_samples: int) -> tuple[list[int], list[int]]:
    """Read epoch 0, then 1, then 0 again."""
    with loader_of(case, num_samples) as loader:
        first, _, again = (read(case, loader, epoch).samples for epoch in (0, 1, 0))
        return first, again


def resume_everywhere(
    case: SourceCase, num_samples: int
) -> tuple[list[list[int]], dict[int, list[list[int]]]]:
    """An epoch, and what a fresh loader makes of it after an interruption at each batch."""
    epoch, rests = 2, {}
    with loader_of(case, num_samples) as loader:
        whole = read(case, loader, epoch).batches
    for start in range(len(whole) + 1):
        with loader_of(case, num_samples) as interrupted:
            interrupted.set_epoch(epoch)
            _read_some(interrupted, start)
            state = interrupted.state_dict()
        with loader_of(case, num_samples) as fresh:
            fresh.load_state_dict(state)
            rests[start] = read(case, fresh, epoch, start).batches
    return whole, rests


def _read_some(loader: Loader, num_batches: int) -> None:
    batches = iter(loader)
    for _ in range(num_batches):
        next(batches)


def save_inside_epoch(case: SourceCase, num_samples: int) -> None:
    """Encode the state after a batch, as a checkpoint does."""
    with loader_of(case, num_samples) as loader:
        loader.set_epoch(1)
        _read_some(loader, 1)
        encode(loader.state_dict(), "state_dict()")


def keep_batches(case: SourceCase, num_samples: int) -> tuple[bool, list[Any], list[Any]]:
    """Whether batches are owned; sample numbers of kept batches, and of copies made at once."""
    identify = case.suite.identify
    with loader_of(case, num_samples) as loader:
        loader.set_epoch(0)
        kept = [identify(batch) for batch in list(loader)]
        loader.set_epoch(0)
        copied = [identify(map_tensors(batch, torch.clone)) for batch in loader]
        return loader.owns_batches, kept, copied


def close_twice(case: SourceCase, num_samples: int) -> None:
    """Close in the middle of an epoch, then again (and once more when the context is left)."""
    with loader_of(case, num_samples) as loader:
        loader.set_epoch(0)
        _read_some(loader, 1)
        loader.close()
        loader.close()


def leave_early(case: SourceCase, num_samples: int) -> tuple[int, int]:
    """Threads and child processes after 3 epochs that were left at once, and after 20."""
    with loader_of(case, num_samples) as loader:
        counts = []
        for epoch in range(20):
            loader.set_epoch(epoch)
            for _ in loader:
                break
            counts.append(_num_threads_and_children())
        return counts[2], counts[-1]


def _num_threads_and_children() -> int:
    tasks = Path(f"/proc/{os.getpid()}/task")
    if not tasks.is_dir():  # not Linux
        return threading.active_count()
    threads = list(tasks.iterdir())
    children = (thread / "children" for thread in threads)
    return len(threads) + sum(len(c.read_text().split()) for c in children if c.exists())


def changes_random_state(case: SourceCase, num_samples: int) -> list[str]:
    """Which random states an epoch changes."""
    with loader_of(case, num_samples) as loader:
        before = rng.capture()
        read(case, loader)
        after = rng.capture()
        return [kind for kind in before if not _is_same(before[kind], after[kind])]


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return all(_is_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


class _Applied(Exception):
    """Raised by a sample transform, to show that it was called."""


def _raise_applied(_: Any) -> Any:
    raise _Applied


def transforms_samples(case: SourceCase, num_samples: int) -> bool:
    """Whether sample transforms are applied."""
    marked = replace(case, sample_transforms=(_raise_applied,))
    try:
        with loader_of(marked, num_samples) as loader:
            read(marked, loader)
    except _Applied:
        return True
    return False
