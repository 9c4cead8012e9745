"""The first samples of a dataset, read twice: what they are, and whether they stay the same."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torchweld.errors import InvalidArgument
from torchweld.guard import Attempt, attempt, one_line
from torchweld_ffcv.errors import ConversionError
from torchweld_ffcv.samples import SampleFields
from torchweld_ffcv.sources import Source

FIRST = 16
"""Samples from which the fields are found out."""


@dataclass(frozen=True)
class Beginning:
    """What is known of a dataset before it is converted.

    Attributes:
        first: samples from the beginning, without bad ones that are skipped.
        again: the same ones, read once more; empty where that cannot be.
        all: every sample of an iterable, those included; None for a map-style dataset.
    """

    first: Sequence[Any]
    again: Sequence[Any]
    all: Iterator[Any] | None


def random_state_kept() -> AbstractContextManager[None]:
    """Samples that are read here draw random numbers; a run that finds its file draws none."""
    if "torch" not in sys.modules:
        return nullcontext()  # its import takes 2 s, and nobody trains in this process
    from torchweld.rng import preserved

    return preserved()


def read_beginning(source: Source, *, skip_bad: bool) -> Beginning:
    """Read the first samples.

    Raises:
        ConversionError: one cannot be read, and bad samples are not skipped.
        InvalidArgument: an iterable is empty.
    """
    if source.iterate is not None:
        return _beginning_of_iterable(source)
    found = _read(source)
    for index, sample in enumerate(found):
        if sample.error is not None and not skip_bad:
            which = f"sample {index} of {source.length}{source.describe(index)}"
            raise ConversionError(
                f"{which} cannot be read: {one_line(sample.error)}; nothing was written "
                "(skip_bad=True leaves such samples out and lists them)",
                index,
            ) from sample.error
    good = [sample.value for sample in found if sample.error is None]
    # Files do not change by being read, and bad samples are not worth a second look.
    again = [] if source.files or len(good) < len(found) else _read(source)
    failed = any(sample.error is not None for sample in again)
    return Beginning(good, [] if failed else [sample.value for sample in again], None)


def check_repeatable(source: Source, fields: SampleFields, beginning: Beginning) -> None:
    """A random transform would be drawn once and be in the file for good, without a word.

    Raises:
        ConversionError: a sample is another one when it is read again.
    """
    both = zip(beginning.first, beginning.again, strict=False)
    for index, (sample, other) in enumerate(both):
        if _stored(fields, sample) != _stored(fields, other):
            raise ConversionError(
                f"sample {index} of {source.label} is another one each time it is read: a random "
                "transform would be drawn once and stay in the file; give the dataset without it "
                "and augment while reading, or keep what is drawn once, by hand: "
                "torchweld_ffcv.convert(…, allow_random=True)",
                index,
            )


def _read(source: Source) -> list[Attempt[Any]]:
    assert source.read is not None  # a source either iterates or reads
    return [attempt(source.read, index) for index in range(min(FIRST, source.length or 0))]


def _beginning_of_iterable(source: Source) -> Beginning:
    assert source.iterate is not None  # asked for by the caller
    samples = source.iterate()
    earlier: list[Any] = []
    if samples is not source.dataset:
        # Before the iterator that is used: two at a time may share what they read from.
        earlier = list(itertools.islice(_heard(samples), FIRST))
        samples = source.iterate()
    first = list(itertools.islice(_heard(samples), FIRST))
    if not first:
        raise InvalidArgument(f"{source.label} is empty: there is nothing to convert")
    return Beginning(first, earlier, itertools.chain(first, _heard(samples, len(first))))


def _heard(samples: Iterator[Any], start: int = 0) -> Iterator[Any]:
    """The samples of an iterable, whose errors get the number of the sample."""
    for index in itertools.count(start):
        sample = attempt(next, samples, StopIteration)
        if sample.error is not None:
            raise ConversionError(
                f"sample {index} cannot be read: {one_line(sample.error)}; nothing was written",
                index,
            ) from sample.error
        if sample.value is StopIteration:
            return
        yield sample.value


def _stored(fields: SampleFields, sample: Any) -> list[Any] | None:
    """What a sample would be in the file; None for a bad one, of which its worker will tell."""
    stored: list[Any] = []

    def put(data: Any) -> int:
        stored.append(bytes(data))
        return 0

    row = attempt(fields.encode, sample, put)
    return None if row.error is not None else [*stored, repr(row.value)]
