"""The loaders of a run, and what follows from their lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from torchweld.errors import InvalidArgument
from torchweld.interfaces import LoaderRequest, RunFacts
from torchweld.loop.timetable import Timetable
from torchweld.loop.wiring import Validation
from torchweld.processes.agree import smallest
from torchweld.setup.launching import guarded

if TYPE_CHECKING:
    from torchweld.interfaces import Loader, Parts
    from torchweld.loop.console import Console
    from torchweld.setup.flags import Duration
    from torchweld.setup.launching import Launched


def data_seed(launched: Launched) -> int:
    """The seed of the order of samples, alike on all ranks.

    Without ``seed=`` it is what torch was seeded with on rank 0, which draws no random number.
    """
    seed = launched.plan.settings.seed
    if seed is not None:
        return seed
    mine = str(torch.initial_seed() % 2**62)
    return int(launched.ranks.exchange("data seed", mine)[0])


def train_loader(
    launched: Launched, data: Any, parts: Parts, seed: int, *, channels_last: bool
) -> Loader:
    """Make the loader of training."""
    request = LoaderRequest(
        data=data,
        train=True,
        env=launched.ranks.env,
        seed=seed,
        sample_transforms=parts.sample_transforms,
        channels_last=channels_last,
    )
    return guarded(launched.plan.data, "opened", lambda: launched.data.build(request))


def evaluation_loader(launched: Launched, data: Any, *, channels_last: bool) -> Loader:
    """Make a loader for validation, evaluation or prediction."""
    env = launched.ranks.env
    request = LoaderRequest(data, train=False, env=env, seed=0, channels_last=channels_last)
    chosen = launched.plan.val_data or launched.plan.data
    return guarded(chosen, "opened", lambda: launched.val_data.build(request))


def validation(
    make_loader: Callable[[Any], Loader],
    sets: Mapping[str, Any],
    duration: Duration,
    console: Console,
) -> Validation:
    """Make the loaders of ``val=``."""
    loaders = {name: make_loader(data) for name, data in sets.items()}
    for name, loader in loaders.items():
        note = getattr(loader, "note", "")
        if note:
            console.say(f"validation data{f' {name!r}' if name else ''}: {note}")
    return Validation(loaders, duration.val_batches)


def make_timetable(
    launched: Launched, loader: Loader, duration: Duration, log_every: int | None, console: Console
) -> Timetable:
    """Decide when everything is due.

    Raises:
        InvalidArgument: the run has no end, or an epoch no batch.
    """
    ranks, settings = launched.ranks, launched.plan.settings
    num_batches, note = smallest(ranks, "batches an epoch", _limited(loader, duration))
    if note:
        console.warn(note)
    if num_batches is None and duration.max_steps is None:
        raise InvalidArgument(
            "the training data has no length: give max_steps=… to say how long to train"
        )
    if num_batches == 0:
        raise InvalidArgument(
            f"an epoch has no batch on each of {ranks.world_size} processes: the data is smaller "
            "than a batch and drop_last=True leaves it out; use a smaller batch_size"
        )
    endless = duration.max_epochs is None and duration.max_steps is None
    table = Timetable(
        accumulate=settings.accumulate_grad_batches,
        batches_per_epoch=num_batches,
        max_steps=duration.max_steps,
        max_epochs=1 if endless else duration.max_epochs,
        uneven=_is_uneven(loader, num_batches, ranks.world_size),
        log_every=log_every,
        val_every_epochs=duration.check_val_every_n_epoch,
    )
    return _with_validation_interval(table, duration.val_check_interval)


def _limited(loader: Loader, duration: Duration) -> int | None:
    limit = duration.train_batches
    if loader.num_batches is None:
        if isinstance(limit, float):
            raise InvalidArgument(
                f"{limit} of an epoch is a fraction, and the data has no length: limit its batches "
                "by a count"
            )
        return limit
    if limit is None:
        return loader.num_batches
    wanted = round(loader.num_batches * limit) if isinstance(limit, float) else limit
    return min(loader.num_batches, max(1, wanted))


def _is_uneven(loader: Loader, num_batches: int | None, world_size: int) -> bool:
    if num_batches is None or loader.num_samples is None or loader.batch_size is None:
        return False
    return num_batches * loader.batch_size * world_size > loader.num_samples


def _with_validation_interval(table: Timetable, interval: int | float | None) -> Timetable:
    if interval is None:
        return table
    if isinstance(interval, int):
        return replace(table, val_every_steps=interval)
    if table.steps_per_epoch is None:
        raise InvalidArgument(
            f"val_check_interval={interval} is a fraction of an epoch, and the data has no length: "
            "give a number of optimizer steps"
        )
    steps = table.steps_per_epoch
    marks = [round(place * interval * steps) for place in range(1, int(1 / interval + 1e-9) + 1)]
    return replace(table, val_in_epoch=tuple(sorted({max(1, mark) for mark in marks})))


def run_numbers(loader: Loader, table: Timetable, world_size: int) -> RunFacts:
    """The numbers that ``torchweld_check_plan`` hooks judge."""
    last = loader.batch_size
    if table.uneven and loader.num_samples is not None and loader.batch_size is not None:
        whole = loader.batch_size * world_size
        last = (loader.num_samples % whole) // world_size
    return RunFacts(world_size, loader.batch_size, last, table.steps_per_epoch, table.total_steps)
