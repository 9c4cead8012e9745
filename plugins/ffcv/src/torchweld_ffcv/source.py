"""Data source ``ffcv``: a ``.beton`` file, or any dataset, converted once."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import DataLoader

from torchweld.data.order import ShardedBatches, shuffled
from torchweld.errors import InvalidArgument, PluginError, TorchweldError
from torchweld_ffcv.beton import Beton, read_beton
from torchweld_ffcv.cache import cached_beton
from torchweld_ffcv.compiled import is_kept
from torchweld_ffcv.datasets import (
    Given,
    Unsupported,
    unwrap_loader,
    without_transform,
)
from torchweld_ffcv.errors import ConversionError
from torchweld_ffcv.fitting import fit_spec
from torchweld_ffcv.loader import BatchReader, FfcvLoader, Threads
from torchweld_ffcv.order import QuasiRandom
from torchweld_ffcv.reading import SpecReader
from torchweld_ffcv.spec import ImageSpec
from torchweld_ffcv.translate import translate

if TYPE_CHECKING:
    from torchweld.interfaces import Loader, LoaderRequest


@dataclass(frozen=True)
class _Chosen:
    """A file and all that decides how it is read."""

    beton: Beton
    given: Given
    spec: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class FfcvSource:
    """Makes one loader a split; the options are those of :class:`torchweld_ffcv.FfcvOptions`."""

    def __init__(
        self,
        *,
        batch_size: int | None,
        num_workers: int | None,
        shuffle: bool | None,
        order: Literal["random", "quasi_random"],
        drop_last: bool,
        spec: Mapping[str, Any] | None,
        pipelines: Mapping[str, Sequence[Any] | None] | None,
        fields: Mapping[str, Any] | None,
        batches_ahead: int,
        on_unsupported: Literal["error", "dataloader"],
        skip_bad: bool,
        cache_dir: str | None,
    ) -> None:
        self.batch_size, self.num_workers = batch_size, num_workers
        self.shuffle, self.order, self.drop_last = shuffle, order, drop_last
        self.spec, self.pipelines, self.fields = spec, pipelines, fields
        self.batches_ahead = batches_ahead
        self.on_unsupported = on_unsupported
        self.skip_bad, self.cache_dir = skip_bad, cache_dir

    def build(self, request: LoaderRequest) -> Loader:
        """Return the loader of one split.

        Raises:
            InvalidArgument: the data or the options cannot be read in this way.
            BetonError: the file is missing or damaged.
            ConversionError: a sample cannot be written.
            PluginError: ffcv is missing.
        """
        try:
            return self._build(request)
        except (Unsupported, ConversionError, PluginError) as reason:
            instead, hindrance = self.on_unsupported == "dataloader", self._hindrance(request.data)
            if instead and not hindrance:
                return self._fallback(request, str(reason))
            if instead:
                raise _no_dataloader(reason, hindrance) from reason
            if not isinstance(reason, Unsupported):
                raise
            option = "data=use('ffcv', on_unsupported='dataloader', …)"
            raise InvalidArgument(
                f"ffcv cannot read this data: {reason}; change it, or read it with a DataLoader"
                + (f" of your own, as one {hindrance}" if hindrance else f": {option}")
            ) from reason

    def _build(self, request: LoaderRequest) -> Loader:
        if request.sample_transforms:
            raise Unsupported("a surgery changes single samples in Python")
        chosen = self._choose(request)
        threads, note = self._threads()
        batches = self._batches(chosen, request)
        reader = self._reader(chosen, request, threads)
        if self.pipelines is not None:  # one thread makes one batch
            threads = replace(threads, batches_ahead=max(threads.batches_ahead, threads.count))
        skipped = _skipped_note(chosen.beton)
        notes = [
            chosen.given.note,
            *chosen.notes,
            skipped,
            note,
            f"batches are a {reader.contract}",
        ]
        return FfcvLoader(
            reader,
            batches,
            threads,
            world_size=request.env.world_size,
            data=chosen.beton.fingerprint or f"{chosen.beton.path.name}: {chosen.beton.num_bytes}",
            note="; ".join(filter(None, notes)),
        )

    # ---- which file ----------------------------------------------------------------------------

    def _choose(self, request: LoaderRequest) -> _Chosen:
        data = request.data
        if isinstance(data, (str, Path)) and not Path(data).is_dir():
            return _Chosen(read_beton(data), Given(None), self.spec or {})
        given = unwrap_loader(data) if isinstance(data, DataLoader) else Given(data)
        bare, transform = without_transform(given.dataset)
        if transform is not None and self.pipelines is None and not self.spec:
            _spec_of(transform)  # what is refused is refused before anything is converted
        beton = read_beton(self._convert(bare, request))
        if transform is None:
            return _Chosen(beton, given, self.spec or {})
        return self._with_transform(_Chosen(beton, given, self.spec or {}), transform)

    def _with_transform(self, chosen: _Chosen, transform: Any) -> _Chosen:
        """Do what the dataset's transform did, unless the user chose something else for it."""
        name = type(transform).__name__
        if self.pipelines is not None:
            return replace(chosen, notes=(f"{name} is replaced by pipelines=",))
        images = [field for field in chosen.beton.fields if field.kind == "image"]
        if images and all({one.name, one.stored_name} & chosen.spec.keys() for one in images):
            return replace(chosen, notes=(f"{name} is replaced by spec=",))
        if len(images) != 1:
            raise Unsupported(
                f"the dataset has a transform, and {len(images)} fields with images to apply it to"
            )
        spec = {images[0].name: _spec_of(transform), **chosen.spec}
        return replace(chosen, spec=spec, notes=(f"{name} runs compiled",))

    def _convert(self, dataset: Any, request: LoaderRequest) -> Path:
        env = request.env
        return cached_beton(
            dataset,
            spec=self.fields,
            rank=env.rank,
            world_size=env.world_size,
            cache_dir=self.cache_dir,
            skip_bad=self.skip_bad,
        )

    def _fallback(self, request: LoaderRequest, reason: str) -> Loader:
        from torchweld.data.torch_source import TorchSource  # only where it is needed

        source = TorchSource(
            batch_size=self.batch_size,
            num_workers=0 if self.num_workers is None else self.num_workers,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            pin_memory=False,
            shard=False,
            sharded=False,
        )
        loader: Any = source.build(request)
        left_out = {
            "fields=": self.fields is not None,
            "skip_bad=True": self.skip_bad,
            "order='quasi_random'": self.order != "random",
        }
        without = " and ".join(words for words, chosen in left_out.items() if chosen)
        how = f"read with a DataLoader{without and f', without {without}'}: {reason}"
        loader.note = "; ".join(filter(None, [loader.note, how]))
        return loader  # type: ignore[no-any-return]  # a Loader with one more note

    def _hindrance(self, data: Any) -> str:
        """Why a DataLoader cannot stand in; empty where it can."""
        if isinstance(data, (str, Path)):
            return "reads no path"  # it would take text for a list of samples, its letters
        if self.pipelines is not None:
            return "has no pipelines="
        return "has no spec=" if self.spec else ""

    # ---- how it is read ------------------------------------------------------------------------

    def _batches(self, chosen: _Chosen, request: LoaderRequest) -> ShardedBatches:
        given, env = chosen.given, request.env
        batch_size = given.batch_size or self.batch_size
        if batch_size is None:
            raise InvalidArgument(
                "the data was given without a batch size: choose one with "
                "data=use('ffcv', batch_size=…), or pass a DataLoader"
            )
        drop_last = self.drop_last if given.drop_last is None else given.drop_last
        return ShardedBatches(
            chosen.beton.num_samples,
            self._order(chosen, request, batch_size),
            seed=request.seed,
            batch_size=batch_size,
            rank=env.rank,
            world_size=env.world_size,
            drop_last=drop_last and request.train,
        )

    def _order(self, chosen: _Chosen, request: LoaderRequest, batch_size: int) -> Any:
        num_samples, own = chosen.beton.num_samples, chosen.given.shuffle
        shuffle = self.shuffle if own is None else own
        if not request.train or shuffle is False:
            in_order = range(num_samples)
            return lambda _seed, _epoch: in_order
        if self.order == "random":
            return partial(shuffled, num_samples)
        if request.env.world_size > 1:
            raise InvalidArgument(
                f"order='quasi_random' reads the file page by page, and {request.env.world_size} "
                "processes would each read every page: use order='random'"
            )
        return QuasiRandom(chosen.beton, window=2 * batch_size)

    def _reader(self, chosen: _Chosen, request: LoaderRequest, threads: Threads) -> BatchReader:
        if self.pipelines is not None:
            return self._pipeline_reader(chosen, threads)
        spec = fit_spec(
            chosen.beton, chosen.spec, train=request.train, channels_last=request.channels_last
        )
        if any(isinstance(one, ImageSpec) for one in spec.values()) and not is_kept("read_images"):
            _say("compiling what reads images at the first batch: some seconds, once")
        return SpecReader(
            chosen.beton,
            spec,
            num_threads=threads.count,
            batches_ahead=threads.batches_ahead,
        )

    def _pipeline_reader(self, chosen: _Chosen, threads: Threads) -> BatchReader:
        from torchweld_ffcv.install import ffcv_module

        ffcv_module("ffcv")  # first, as it says what is missing
        from torchweld_ffcv.pipelines import PipelineReader

        batch_size = chosen.given.batch_size or self.batch_size or 1
        _say("compiling the pipelines: some seconds, in every process, as FFCV keeps nothing")
        return PipelineReader(
            chosen.beton, self.pipelines or {}, batch_size=batch_size, num_threads=threads.count
        )

    def _threads(self) -> tuple[Threads, str]:
        """This process's threads; no more than it may use cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cores = cores or 1
        if self.num_workers is None:
            share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            return Threads(share, self.batches_ahead), ""
        count, note = min(self.num_workers, cores), ""
        if count < self.num_workers:
            note = f"{self.num_workers} workers asked, this process may use {cores} cores: {count}"
        return Threads(count, self.batches_ahead), note


def _no_dataloader(reason: Exception, hindrance: str) -> TorchweldError:
    """What is raised where a DataLoader was asked to stand in and cannot."""
    words = f"{reason}; on_unsupported='dataloader' cannot help, as a DataLoader {hindrance}"
    if isinstance(reason, ConversionError):
        return ConversionError(words, reason.sample)
    if isinstance(reason, PluginError):
        return PluginError(words)
    return InvalidArgument(f"ffcv cannot read this data: {words}")


def _skipped_note(beton: Beton) -> str:
    count = beton.manifest.data.get("num_skipped", 0) if beton.manifest is not None else 0
    if not count:
        return ""
    return f"left out {count:,} bad samples (torchweld ffcv inspect {beton.path} lists them)"


def _spec_of(transform: Any) -> ImageSpec:
    translation = translate(transform)
    if translation.spec is None:
        raise Unsupported(f"transforms of its own: {', '.join(translation.refused)}")
    return translation.spec


def _say(text: str) -> None:
    sys.stderr.write(f"ffcv: {text}\n")  # as while converting: a wait must not seem to hang
    sys.stderr.flush()
