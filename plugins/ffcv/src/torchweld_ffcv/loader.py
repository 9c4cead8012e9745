"""The loader of one split: batches read ahead by threads of its own, in core's order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from torchweld.data.order import ShardedBatches
from torchweld.errors import CheckpointError
from torchweld_ffcv.array_types import keep_bytes_writable
from torchweld_ffcv.columns import Rows
from torchweld_ffcv.contract import BatchContract
from torchweld_ffcv.reading import Pending


class BatchReader(Protocol):
    """Reads any batch of a file, given the numbers of its samples.

    Attributes:
        owns_batches: a batch stays as it is when the next one comes.
        contract: what a batch holds.
    """

    owns_batches: bool
    contract: BatchContract

    def submit(self, pool: Executor, rows: Rows) -> Pending:
        """Begin to read a batch in the threads of ``pool``."""


@dataclass(frozen=True)
class Threads:
    """How reading runs beside training.

    Attributes:
        count: threads that read.
        batches_ahead: batches that are read or ready while one is in use, >= 1.
    """

    count: int
    batches_ahead: int


class FfcvLoader:
    """Batches of a ``.beton`` file for this process.

    Attributes:
        contract: names, shapes, dtypes, layouts and value ranges of a batch.
        note: what was decided about the user's data.
    """

    on_device = False
    sharded = True

    def __init__(
        self,
        reader: BatchReader,
        batches: ShardedBatches,
        threads: Threads,
        *,
        world_size: int,
        data: str,
        note: str = "",
    ) -> None:
        self._reader, self._batches, self._threads = reader, batches, threads
        self._global_batch = batches.batch_size * world_size
        self._world_size, self._data = world_size, data
        self.note = note
        self.owns_batches = reader.owns_batches
        self.contract = reader.contract
        self.batch_size: int | None = batches.batch_size
        self.num_batches: int | None = len(batches)
        self.num_samples: int | None = batches.num_samples
        self._epoch = self._start = self._position = 0
        self._misfit = ""
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        if self._misfit:
            raise CheckpointError(self._misfit)
        self._batches.set_epoch(self._epoch, self._start)
        self._position = self._start
        # A DataLoader draws one number when an epoch begins. With the same random state afterwards,
        # dropout and CutMix do the same in a run that reads with one and in a run that reads here.
        torch.empty((), dtype=torch.int64).random_()
        return self._read_ahead(iter(self._batches), self._epoch)

    def samples(self, batch: Any) -> int:
        """Real samples of the batch just yielded."""
        return self._batches.real[self._position - 1]

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Make the next ``iter`` that epoch's, from that batch on."""
        self._epoch, self._start, self._misfit = epoch, start_batch, ""

    def state_dict(self) -> Mapping[str, object]:
        """Seed and position: the number of samples that all processes have read in this epoch."""
        return {
            "order": "ffcv",
            "seed": self._batches.seed,
            "epoch": self._epoch,
            "samples": self._position * self._global_batch,
            "num_samples": self._batches.num_samples,
            "data": self._data,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader stopped, on any number of processes.

        Raises:
            CheckpointError: it read other data.
        """
        if state.get("order") != "ffcv" or state["data"] != self._data:
            raise CheckpointError(
                f"the interrupted epoch read {state.get('data', 'other data')!r}, and this run "
                f"reads {self._data!r}: resume with the data and options that the checkpoint was "
                "made with"
            )
        self._batches.seed = state["seed"]
        self._take_position(int(state["epoch"]), int(state["samples"]))

    def _take_position(self, epoch: int, samples: int) -> None:
        batch, rest = divmod(samples, self._global_batch)
        self.set_epoch(epoch, batch)
        if rest:  # an error only if nobody sets another position
            self._misfit = (
                f"{samples} samples of the epoch were read, which is no whole number of batches of "
                f"{self.batch_size} on each of {self._world_size} "
                "processes: resume with a batch size and a number of processes that divide it"
            )

    def close(self) -> None:
        """Stop the threads, once they have finished what they are at."""
        if self._pool is not None:
            self._pool[1].shutdown(cancel_futures=True)
            self._pool = None

    # ---- reading ahead -------------------------------------------------------------------------

    def _read_ahead(self, chunks: Iterator[list[int]], epoch: int) -> Iterator[Any]:
        keep_bytes_writable()
        pool, seed = self._executor(), self._batches.seed
        rows = (Rows(np.asarray(chunk, np.int64), seed, epoch) for chunk in chunks)
        begun = (self._reader.submit(pool, each) for each in rows)
        pending = deque(islice(begun, self._threads.batches_ahead))
        try:
            while pending:
                batch = pending.popleft().result()
                pending.extend(islice(begun, 1))
                self._position += 1
                yield batch
        finally:  # also when the loop over it is left early
            for each in pending:
                each.cancel()

    def _executor(self) -> ThreadPoolExecutor:
        """The threads; a forked process needs its own, as threads stay behind in the parent."""
        if self._pool is None or self._pool[0] != os.getpid():
            threads = ThreadPoolExecutor(self._threads.count, thread_name_prefix="ffcv")
            self._pool = (os.getpid(), threads)
        return self._pool[1]
