"""FFCV's own pipelines, run by FFCV's own compiler in threads of ours.

The user's lists and operations are copied and left as they are. Each batch is made by one thread
from beginning to end: numba's threading layer is not used, numba's random numbers are seeded for
every batch, and what the pipeline raises is raised in the training process.

Imported only where ``pipelines=`` is given, so ffcv is there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
import torch
from ffcv.loader.epoch_iterator import select_buffer
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.graph import Graph
from ffcv.reader import Reader

from torchweld.errors import InvalidArgument, RunError
from torchweld_ffcv.array_types import keep_bytes_writable
from torchweld_ffcv.beton import Beton
from torchweld_ffcv.columns import Rows
from torchweld_ffcv.contract import BatchContract, FieldContract
from torchweld_ffcv.randomness import sample_key
from torchweld_ffcv.reading import Pending

Array = np.ndarray[Any, Any]


class PipelineReader:
    """Reads batches with FFCV's pipelines.

    Args:
        beton: the file.
        pipelines: field to operations, as for FFCV's Loader; None leaves a field out, and a field
            that is not named has FFCV's default pipeline.
        batch_size: samples of the largest batch.
        num_threads: batches made at the same time.

    Raises:
        InvalidArgument: a field does not exist, or operations do not fit each other.
    """

    owns_batches = True

    def __init__(
        self,
        beton: Beton,
        pipelines: Mapping[str, Sequence[Any] | None],
        *,
        batch_size: int,
        num_threads: int,
    ) -> None:
        self._beton = beton
        self._graphs = _compiled_graphs(beton, _specs(beton, pipelines), batch_size, num_threads)
        self._slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(num_threads):
            self._slots.put(slot)
        self._numbers = {f.stored_name for f in beton.fields if f.kind in {"int", "float"}}
        first = self._run(Rows(np.zeros(1, np.int64), seed=0, epoch=0))
        names = {field.stored_name: field.name for field in beton.fields}
        outputs = [output for graph in self._graphs for output in graph.outputs]
        self._names = tuple(names.get(output, output) for output in outputs)
        self.contract = BatchContract(
            tuple(_contract(name, value) for name, value in zip(self._names, first, strict=True)),
            "dict" if beton.container == "mapping" else "tuple",
        )

    def submit(self, pool: Executor, rows: Rows) -> Pending:
        """Begin to make a batch."""
        future = pool.submit(self._run, rows)
        return Pending([future], lambda: self._assemble(future.result()))

    def _assemble(self, values: Sequence[Any]) -> Any:
        if self.contract.form == "dict":
            return dict(zip(self._names, values, strict=True))
        return tuple(values)

    def _run(self, rows: Rows) -> list[Any]:
        slot = self._slots.get()
        try:
            key = int(sample_key(rows.seed, rows.epoch, int(rows.numbers[0])))
            _seed_numba(key & 0xFFFFFFFF)  # type: ignore[type-var]  # numba types a decorator only
            return [value for graph in self._graphs for value in self._values(graph, rows, slot)]
        finally:
            self._slots.put(slot)

    def _values(self, graph: _CompiledGraph, rows: Rows, slot: int) -> list[Any]:
        try:
            results = graph.run(rows.numbers, slot)
        except Exception as error:  # whatever the user's operations raise
            raise self._located(graph, rows, slot, error) from error
        pairs = zip(graph.outputs, results, strict=True)
        return [self._owned(output, value, len(rows.numbers)) for output, value in pairs]

    def _owned(self, output: str, value: Any, count: int) -> Any:
        """A copy, as the next batch is written over it; numbers with shape (batch,)."""
        tensor = torch.as_tensor(value)
        if tensor.dim() == 0 or (output in self._numbers and tensor.numel() == count):
            # FFCV gives numbers as (batch, 1), and its Squeeze() takes the batch away from one.
            tensor = tensor.reshape(count)
        return tensor[:count].clone()

    def _located(self, graph: _CompiledGraph, rows: Rows, slot: int, error: Exception) -> RunError:
        """Say which sample it was, by running them one by one."""
        where = f"the samples {rows.numbers[:8].tolist()} …"
        for number in rows.numbers:
            try:
                graph.run(np.array([number]), slot)
            except Exception:  # noqa: BLE001, PERF203 - whatever the user's operations raise
                where = f"sample {number}"
                break
        fields = " and ".join(map(repr, graph.outputs))
        first_line = next(iter(str(error).strip().splitlines()), "")
        return RunError(
            f"the pipeline of field {fields} failed at {where} of {self._beton.path}: "
            f"{type(error).__name__}: {first_line}"
        )


@numba.njit
def _seed_numba(seed: int) -> None:
    """Seed the numbers that compiled operations draw in the calling thread."""
    np.random.seed(seed)


def _contract(name: str, value: Any) -> FieldContract:
    last = value.dim() == 4 and not value.is_contiguous()
    dtype = str(value.dtype).removeprefix("torch.")
    layout = "channels_last" if last else "contiguous"
    return FieldContract(name, tuple(value.shape[1:]), dtype, layout)


# ---- FFCV's graph --------------------------------------------------------------------------------


class _Memory(OSCacheManager):  # type: ignore[misc]  # ffcv has no type information
    """FFCV's access to the mapped file without the dictionaries that another order needs.

    They cost 3.4 s and 600 MB for 1.28 million samples (ffcv 1.0.2).
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        order = np.argsort(reader.alloc_table["ptr"], kind="stable")
        self.ptrs = reader.alloc_table["ptr"][order]
        self.sizes = reader.alloc_table["size"][order]
        self.context = OSCacheContext(self)


class _File:
    """What all graphs of a file share."""

    def __init__(self, beton: Beton) -> None:
        self.reader = Reader(str(beton.path))
        self.positions = {name: place for place, name in enumerate(self.reader.handlers)}
        memory = _Memory(self.reader)
        self.storage = memory.schedule_epoch(()).__enter__().state
        keep_bytes_writable()
        self.read = memory.compile_reader()


class _CompiledGraph:
    """Some pipelines of FFCV, the code it makes of them, and memory for every thread.

    Attributes:
        outputs: names in the order of the results.
    """

    def __init__(
        self, file: _File, specs: Mapping[str, Any], batch_size: int, num_slots: int
    ) -> None:
        self.outputs = list(specs)
        self._file = file
        reader = file.reader
        graph = Graph(specs, reader.handlers, file.positions, reader.metadata, file.read)
        _, code = graph.collect_requirements()
        self._stages, self._results = graph.codegen_all(code)
        self._memory = graph.allocate_memory(batch_size, num_slots)

    def run(self, numbers: Array, slot: int) -> list[Any]:
        """Results of one batch; they alias memory that the next batch is written into."""
        values: dict[str, Any] = {
            "batch_indices": numbers,
            "storage_state": self._file.storage,
            "metadata": self._file.reader.metadata,
        }
        for kind, prefix in (("operation", "memory"), ("shared", "shared_memory")):
            for node, buffer in self._memory[kind].items():
                values[f"{prefix}_{node}"] = select_buffer(buffer, slot, len(numbers))
        for code, defined in self._stages:
            for node, result in zip(defined, code(**values), strict=True):
                values[f"result_{node}"] = result
        return [values[f"result_{node}"] for node in self._results]


def _compiled_graphs(
    beton: Beton, specs: Mapping[str, Any], batch_size: int, num_slots: int
) -> list[_CompiledGraph]:
    """One graph a field, so that an error has a name; one for all where they refer to each other.

    Raises:
        InvalidArgument: operations do not fit each other.
    """
    alone = all(isinstance(spec.source, str) for spec in specs.values())
    groups = [{name: spec} for name, spec in specs.items()] if alone else [dict(specs)]
    with _one_thread_each():
        file = _File(beton)
        return [_compiled_graph(file, group, batch_size, num_slots) for group in groups]


def _compiled_graph(
    file: _File, group: Mapping[str, Any], batch_size: int, num_slots: int
) -> _CompiledGraph:
    try:
        return _CompiledGraph(file, group, batch_size, num_slots)
    except (AssertionError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArgument(
            f"the pipeline of field {' and '.join(map(repr, group))} cannot be compiled: {error}; "
            "the order is decoder, operations on arrays (crop, flip, NormalizeImage), ToTensor(), "
            "ToTorchImage(), operations on tensors"
        ) from error


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let FFCV make code for one thread, without its call of ``torch.set_num_threads``."""
    before = Compiler.num_threads
    Compiler.num_threads = 1
    try:
        yield
    finally:
        Compiler.num_threads = before


def _specs(beton: Beton, pipelines: Mapping[str, Sequence[Any] | None]) -> dict[str, Any]:
    """A copy of every pipeline, under the names that FFCV has for the fields."""
    stored = {field.name: field.stored_name for field in beton.fields}
    copies: dict[int, Any] = {}

    def copied(operation: Any) -> Any:
        # One operation in two pipelines stays one: FFCV refers to it by identity.
        return copies.setdefault(id(operation), copy.copy(operation))

    specs: dict[str, Any] = {}
    given = {stored.get(name, name): pipeline for name, pipeline in pipelines.items()}
    for name in [*stored.values(), *(name for name in given if name not in stored.values())]:
        pipeline = given.get(name, ())
        if isinstance(pipeline, PipelineSpec):
            specs[name] = _copied_spec(pipeline, copied)
        elif name not in stored.values():
            raise InvalidArgument(
                f"pipelines={name!r} is no field of {beton.path}: its fields are "
                f"{', '.join(map(repr, stored))}"
            )
        elif pipeline is not None:
            specs[name] = PipelineSpec(name, None, [copied(each) for each in pipeline] or None)
    return specs


def _copied_spec(spec: Any, copied: Any) -> Any:
    source = spec.source if isinstance(spec.source, str) else copied(spec.source)
    decoder = None if spec.decoder is None else copied(spec.decoder)
    return PipelineSpec(source, decoder, [copied(each) for each in spec.transforms])
