"""What is wrong with a configuration by itself: keys, values, and what torchweld cannot run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torchweld.spelling import closest
from torchweld_deepspeed.reading import Configuration, shown
from torchweld_deepspeed.schema import AUTO, HALF, REMOVED, SHORT_NAMES, TOP, Kind, Section

COMMENT_MARKS = ("_", "#", "/", "$")
"""How a key begins that somebody wrote as a remark, since JSON has none."""


class Refused(NamedTuple):
    """A value that cannot be run.

    Attributes:
        meets: whether a value is meant.
        why: a clause that follows "…:".
    """

    meets: Callable[[Any], bool]
    why: str


def _is_true(value: object) -> bool:
    return value is True


def _is_on(table: object) -> bool:
    return isinstance(table, dict) and table.get("enabled") is True


def _is_given(value: object) -> bool:
    return value is not None


UNTRIED = "nobody has tried it with torchweld, so leave it out"

REFUSED: Mapping[str, Refused] = {
    "managed_gradient_accumulation": Refused(
        _is_true, "its windows would drift from the Trainer's, so leave it out"
    ),
    "gradient_allreduce_op": Refused(
        lambda value: value == "sum",
        "gradients would grow with the number of processes, so leave it out",
    ),
    "bf16.bf16_master_weights_and_grads": Refused(
        _is_true, "no weight would be kept in fp32 (losses were off by 0.16), so leave it out"
    ),
    "bf16.bf16_optimizer_states": Refused(
        _is_true, "no state of the optimizer would be kept in fp32, so leave it out"
    ),
    "bf16.immediate_grad_update": Refused(_is_true, UNTRIED),
    "fp16.fp16_master_weights_and_grads": Refused(
        _is_true, "no weight would be kept in fp32, so leave it out"
    ),
    "torch_autocast.dtype": Refused(
        lambda value: value in HALF,
        "DeepSpeed clips gradients that its loss scale still multiplies, and never lowers that "
        "scale after an overflow, so use fp16.enabled",
    ),
    "data_types.param_dtype": Refused(_is_given, "precision= of the Trainer says it"),
    "data_types.buffer_dtype": Refused(_is_given, "precision= of the Trainer says it"),
    "activation_checkpointing.partition_activations": Refused(
        _is_true, "Trainer(activation_checkpointing=True) takes its place"
    ),
    "activation_checkpointing.cpu_checkpointing": Refused(
        _is_true, "Trainer(activation_checkpointing=True) takes its place"
    ),
    "optimizer.params.max_grad_norm": Refused(
        _is_given, "DeepSpeed does not read it there; gradient_clipping is the key"
    ),
    "tensorboard": Refused(_is_on, "Trainer(logger=...) takes its place"),
    "wandb": Refused(_is_on, "Trainer(logger=...) takes its place"),
    "csv_monitor": Refused(_is_on, "Trainer(logger=...) takes its place"),
    "comet": Refused(_is_on, "Trainer(logger=...) takes its place"),
    "autotuning": Refused(_is_on, UNTRIED),
    "hybrid_engine": Refused(_is_on, UNTRIED),
    "data_efficiency": Refused(_is_on, "the order of samples is the data source's"),
    "flops_profiler": Refused(_is_on, UNTRIED),
    "pipeline": Refused(bool, "torchweld does not cut a model into pipeline stages"),
    "tensor_parallel": Refused(bool, UNTRIED),
    "expert_parallel": Refused(bool, UNTRIED),
    "sequence_parallel_size": Refused(lambda value: value != 1, UNTRIED),
    "weight_quantization": Refused(bool, UNTRIED),
    "datastates_ckpt": Refused(bool, "torchweld writes checkpoints itself"),
    "compile.deepcompile": Refused(_is_true, UNTRIED),
    "zero_optimization.zenflow": Refused(bool, UNTRIED),
    "aio.use_gds": Refused(_is_true, UNTRIED),
    "zero_optimization.legacy_stage1": Refused(_is_true, UNTRIED),
    "zero_optimization.elastic_checkpoint": Refused(
        _is_true, "torchweld's checkpoints resume on any number of processes"
    ),
    "zero_optimization.compute_grad_norm": Refused(
        lambda value: value is False, "the Trainer logs the norm"
    ),
    "zero_optimization.zero_hpz_partition_size": Refused(
        lambda value: value != 1, "a resumed run would train on the old second copy of the weights"
    ),
    "zero_optimization.zero_quantized_weights": Refused(_is_true, UNTRIED),
    "zero_optimization.zero_quantized_nontrainable_weights": Refused(_is_true, UNTRIED),
    "zero_optimization.zero_quantized_gradients": Refused(_is_true, UNTRIED),
    "zero_optimization.offload_optimizer.super_offload": Refused(_is_true, UNTRIED),
    "zero_optimization.offload_optimizer.ratio": Refused(lambda value: value != 1, UNTRIED),
}
"""Path to the values there that DeepSpeed takes and this plugin does not, each with its reason."""

EXCLUSIVE: tuple[tuple[str, str], ...] = (
    ("bf16.enabled", "fp16.enabled"),
    ("bf16.enabled", "torch_autocast.enabled"),
    ("fp16.enabled", "torch_autocast.enabled"),
)
"""Two ways to compute in reduced precision."""

TWICE: tuple[tuple[str, str], ...] = (
    ("bf16", "bfloat16"),
    ("zero_optimization.cpu_offload", "zero_optimization.offload_optimizer"),
    ("zero_optimization.cpu_offload_param", "zero_optimization.offload_param"),
    *((f"zero_optimization.{a}", f"zero_optimization.{b}") for a, b in SHORT_NAMES.items()),
)
"""Two names of one thing."""


def find_faults(config: Configuration) -> list[str]:
    """Say what is wrong with a configuration, whatever the Trainer says.

    Returns:
        Clauses without an end, one for each fault; empty when all is well.
    """
    found = list(_walk(config, TOP, ""))
    # A value of the wrong kind is answered once, not again by what it would mean.
    return found or [*_refused(config), *_twice(config), *_batch(config), *_scheduler(config)]


def is_remark(key: str) -> bool:
    """Whether a key is a remark to the reader, such as ``"_comment"``."""
    return key.startswith(COMMENT_MARKS)


def _walk(table: Mapping[str, Any], section: Section, path: str) -> Iterator[str]:
    for key, value in table.items():
        where = f"{path}.{key}" if path else key
        kind = section.get(key)
        if is_remark(key):
            continue
        if where in REMOVED:
            yield f"{where} is gone from DeepSpeed 0.19: delete it ({REMOVED[where]})"
        elif kind is None:
            yield _unknown(key, where, section, path)
        elif value != AUTO:
            yield from _value(value, kind, where)


def _value(value: object, kind: Kind | Section, where: str) -> Iterator[str]:
    if isinstance(kind, Kind):
        if not kind.fits(value):
            yield f"{where}={shown(value)} is not {kind.says}"
    elif isinstance(value, dict):
        yield from _walk(value, kind, where)
    elif value is not None or where not in _MAY_BE_NULL:
        yield _no_table(where, value)


_MAY_BE_NULL = (
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "aio",
)


def _unknown(key: str, where: str, section: Section, path: str) -> str:
    meant = closest(key, section)
    found = f"{path}.{meant}" if path and meant else meant
    # Exactly this key in another table beats one that is only spelled alike here.
    elsewhere = [name for name in _paths(TOP) if name.split(".")[-1] == key]
    found = (elsewhere or [found])[0]
    meaning = f"; did you mean {found!r}?" if found else ", so it would do nothing: delete it"
    return f"{where!r} is no key of DeepSpeed's{meaning}"


def _paths(section: Section, path: str = "") -> Iterator[str]:
    for key, kind in section.items():
        where = f"{path}.{key}" if path else key
        yield where
        if not isinstance(kind, Kind):
            yield from _paths(kind, where)


def _no_table(where: str, value: object) -> str:
    write = ""
    if where == "zero_optimization" and isinstance(value, bool):
        write = f': write {{"stage": {int(value)}}}'
    return f"{where}={shown(value)} is not a table of keys{write}"


def _refused(config: Configuration) -> Iterator[str]:
    for path, refused in REFUSED.items():
        value = config.at(path)
        if value is not None and refused.meets(value):
            said = " is on" if isinstance(value, dict) else f"={shown(value)}"
            yield f"{path}{said}: {refused.why}"


def _twice(config: Configuration) -> Iterator[str]:
    for one, other in EXCLUSIVE:
        if config.at(one) is True and config.at(other) is True:
            yield f"{one} and {other} are both true: keep one of them"
    for one, other in TWICE:
        if config.at(one) is not None and config.at(other) is not None:
            yield f"{one} and {other} mean the same: keep {other}"


def _batch(config: Configuration) -> Iterator[str]:
    total, micro = config.at("train_batch_size"), config.at("train_micro_batch_size_per_gpu")
    window = config.at("gradient_accumulation_steps") or 1
    if total and micro and total % (micro * window):
        yield (
            f"train_batch_size={total} is no multiple of train_micro_batch_size_per_gpu={micro} "
            f"times gradient_accumulation_steps={window}: give sizes that fit, or leave one out"
        )


def _scheduler(config: Configuration) -> Iterator[str]:
    """One whose numbers are the trainer's says nothing; another would be stepped by nobody."""
    kind, given = config.at("scheduler.type"), config.at("scheduler.params") or {}
    if kind and (not given or any(value != AUTO for value in given.values())):
        yield (
            f"scheduler.type={shown(kind)}: torchweld's loop steps the schedule, so give "
            "lr_scheduler= to fit or prepare, and delete the section"
        )
