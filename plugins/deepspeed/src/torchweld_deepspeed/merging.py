"""A user's configuration beside the options and the Trainer: one value, or both places named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from torchweld.errors import InvalidArgument
from torchweld.spelling import did_you_mean
from torchweld_deepspeed.checking import find_faults
from torchweld_deepspeed.reading import Configuration, read_config, shown
from torchweld_deepspeed.schema import AUTO

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from torchweld.components import Settings
    from torchweld.interfaces import OptimizerFactory, ParamGroup, RunFacts
    from torchweld_deepspeed.options import DeepSpeedOptions

STAGE = 2
"""The stage where neither the options nor the configuration say one."""


class Wish(NamedTuple):
    """A setting of the Trainer that the configuration says too.

    Attributes:
        setting: its name there.
        value: as the Trainer would have it.
        reason: the key, its value and the file.
    """

    setting: str
    value: object
    reason: str


# ---- options -------------------------------------------------------------------------------------


def settle(options: DeepSpeedOptions) -> dict[str, Any]:
    """Read the configuration, and let options that were left out take what it says.

    Returns:
        The options that change, by name.

    Raises:
        ValueError: the configuration has faults, or contradicts an option; names all of it.
        TypeError: it is neither a path nor a mapping.
    """
    config = read_config(options.config)
    taken, faults = _taken(options, config) if config else ({"config": config}, [])
    if config and faults:
        raise ValueError(f"{config.source}: {'; '.join(faults)}")
    values = {field.name: getattr(options, field.name) for field in fields(options)} | taken
    if values["stage"] is None:
        values["stage"] = taken["stage"] = STAGE
    faults = list(_contradictions(values))
    if faults:
        raise ValueError("; ".join(faults))
    return taken


def _taken(options: DeepSpeedOptions, config: Configuration) -> tuple[dict[str, Any], list[str]]:
    """What the options take from a configuration, and where it is wrong or contradicts them."""
    faults = find_faults(config)
    said = {} if faults else _said(config)
    defaults = {field.name: field.default for field in fields(options)}
    taken: dict[str, Any] = {"config": config}
    for name, (path, value) in said.items():
        given = getattr(options, name)
        if given == defaults[name]:
            taken[name] = value
        elif given != value:
            faults.append(
                f"{path}={shown(value)}, but the option {name}={given!r}: keep one of them, or "
                f'write "{AUTO}" there'
            )
    return taken, faults


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """Options that DeepSpeed would ignore, or fail on after the processes have started."""
    if values["stage"] == 0:
        yield (
            "stage=0 shards nothing, and in bf16 and fp16 it takes a step before the first batch: "
            "choose strategy='ddp', which is what stage 0 is, or a stage of 1, 2 or 3"
        )
        return
    yield from _only_for_stage_3(values)
    yield from _drive(values)
    config = values["config"]
    said = config is not None and config.at("zero_optimization.overlap_comm") is True
    if values["overlap_comm"] and values["stage"] == 1 and not said:
        yield "overlap_comm=True with stage=1: DeepSpeed cannot where the loop owns its windows"
    yield from _unfit_for_stage(config, values["stage"])
    if values["bucket_elements"] is not None and values["bucket_elements"] < 1:
        yield f"bucket_elements={values['bucket_elements']} is not a whole number >= 1"
    if values["persistence_threshold"] < 0:
        yield f"persistence_threshold={values['persistence_threshold']} is not a whole number >= 0"


def _only_for_stage_3(values: Mapping[str, Any]) -> Iterator[str]:
    if values["stage"] == 3:
        return
    if values["zero_init"]:
        yield (
            f"zero_init=True with stage={values['stage']}: it cuts parameters into pieces, and "
            "this stage keeps them whole, so leave it out, or take stage=3"
        )
    if values["offload_params"]:
        yield (
            f"offload_params={values['offload_params']!r} with stage={values['stage']}: only "
            "stage 3 can, DeepSpeed would ignore it"
        )
    if values["offload_optimizer"] == "nvme":
        yield (
            f"offload_optimizer='nvme' with stage={values['stage']}: only stage 3 keeps it on a "
            "drive, and DeepSpeed would keep it in host memory, so take 'cpu', or stage=3"
        )


def _drive(values: Mapping[str, Any]) -> Iterator[str]:
    if "nvme" in (values["offload_optimizer"], values["offload_params"]):
        if values["nvme_path"] is None and values["stage"] == 3:
            yield "offloading to 'nvme' needs nvme_path, a directory on the drive"
    elif values["nvme_path"] is not None:
        yield f"nvme_path={values['nvme_path']!r}, but nothing is offloaded to 'nvme'"


def _unfit_for_stage(config: Configuration | None, stage: int) -> Iterator[str]:
    """What the engine asserts, or what would make another optimizer of it."""
    if config is None:
        return
    if stage == 1 and config.at("data_types.grad_accum_dtype") == "fp32":
        yield (
            "data_types.grad_accum_dtype='fp32' with stage=1 has DeepSpeed take another optimizer, "
            "whose pieces torchweld cannot save: leave it out, or choose stage 2"
        )
    if stage == 1 or config.at("zero_optimization.reduce_scatter") is False:
        return
    for key, off in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
        value = config.at(key)
        if value is not None and value != off:
            yield (
                f"{key}={shown(value)} with stage={stage} needs "
                "zero_optimization.reduce_scatter=false: write it, or leave the key out"
            )


def _said(config: Configuration) -> dict[str, tuple[str, Any]]:
    """Option to the path and the value that a configuration has for it."""
    said = _offloading(config)
    for option, path in _PLACES.items():
        value = zero_value(config, path) if path.startswith(_ZERO) else config.at(path)
        if value is not None:
            said[option] = path, int(value) if option in _WHOLE else value
    if config.at(_SENT_REDUCED):
        said["communication_dtype"] = _SENT_REDUCED, "bf16"
    if config.at(_FORCES) is True and "offload_optimizer" in said:
        said["cpu_adam"] = _FORCES, True
    return said


def _offloading(config: Configuration) -> dict[str, tuple[str, Any]]:
    said: dict[str, tuple[str, Any]] = {}
    for option, (old, new) in _OFFLOADS.items():
        device, path = f"{new}.device", f"{new}.nvme_path"
        if config.at(old) is True:
            said[option] = old, "cpu"
        elif config.at(device) in ("cpu", "nvme"):
            said[option] = device, config.at(device)
        if config.at(device) == "nvme" and config.at(path) is not None:
            said.setdefault("nvme_path", (path, config.at(path)))
    return said


_ZERO = "zero_optimization."
_PLACES: Mapping[str, str] = {
    "stage": "zero_optimization.stage",
    "bucket_elements": "zero_optimization.reduce_bucket_size",
    "overlap_comm": "zero_optimization.overlap_comm",
    "persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "communication_dtype": "communication_data_type",
}
_FORCES = "zero_force_ds_cpu_optimizer"
_SENT_REDUCED = "torch_autocast.lower_precision_safe_modules"
_WHOLE = ("stage", "bucket_elements", "persistence_threshold")
_OFFLOADS: Mapping[str, tuple[str, str]] = {
    "offload_optimizer": ("zero_optimization.cpu_offload", "zero_optimization.offload_optimizer"),
    "offload_params": ("zero_optimization.cpu_offload_param", "zero_optimization.offload_param"),
}


def zero_value(config: Configuration, path: str) -> Any:
    """The value at ``path``, under either of its names."""
    value = config.at(path)
    short = path.replace(".stage3_", ".")
    return config.at(short) if value is None and short != path else value


# ---- settings of the Trainer ---------------------------------------------------------------------


def find_wishes(options: DeepSpeedOptions, settings: Settings) -> list[Wish]:
    """The settings that a configuration says too, for ``Claims.sets``.

    Core takes such a value where the Trainer has its default, and otherwise compares the two.

    Args:
        options: with or without a configuration.
        settings: of the Trainer, with what was taken already.
    """
    config = read_config(options.config)
    if config is None:
        return []
    return [*_window(config), *_clipping(config), *_precision(config, settings)]


def _window(config: Configuration) -> Iterator[Wish]:
    window = config.at("gradient_accumulation_steps")
    if window is not None:
        reason = _reason(config, "gradient_accumulation_steps")
        yield Wish("accumulate_grad_batches", int(window), reason)


def _clipping(config: Configuration) -> Iterator[Wish]:
    limit = config.at("gradient_clipping")
    if limit is not None:
        reason = _reason(config, "gradient_clipping")
        yield Wish("gradient_clip_val", float(limit) if limit > 0 else None, reason)


def _precision(config: Configuration, settings: Settings) -> Iterator[Wish]:
    """The section that is on; or one that is off although the Trainer's precision turns it on."""
    meant = {_section(config): "bf16-true", "fp16": "16", "torch_autocast": "bf16"}
    for section, precision in meant.items():
        path = f"{section}.enabled"
        if config.at(path) is True:
            yield Wish("precision", precision, _reason(config, path))
        elif config.at(path) is False and settings.precision == precision:
            yield Wish("precision", "32", _reason(config, path))


def _section(config: Configuration) -> str:
    return "bfloat16" if "bfloat16" in config else "bf16"


def _reason(config: Configuration, path: str) -> str:
    return f"{path}={shown(config.at(path))} in {config.source}"


# ---- numbers of the run --------------------------------------------------------------------------


def find_batch_faults(options: DeepSpeedOptions, settings: Settings, facts: RunFacts) -> list[str]:
    """Say where the batch sizes of a configuration are not those of this run.

    DeepSpeed compares them with each other only, never with a batch.
    """
    config = read_config(options.config)
    if config is None or facts.batch_size is None:
        return []
    window, ranks = settings.accumulate_grad_batches, facts.world_size
    product = (
        f"{facts.batch_size} a process times accumulate_grad_batches={window} times "
        f"{ranks} processes"
    )
    real = {
        "train_micro_batch_size_per_gpu": (facts.batch_size, "the data"),
        "train_batch_size": (facts.batch_size * window * ranks, product),
    }
    return [
        f"{path}={shown(config.at(path))} in {config.source}, but batches of {size} ({how})"
        for path, (size, how) in real.items()
        if config.at(path) is not None and config.at(path) != size
    ]


# ---- the optimizer -------------------------------------------------------------------------------


def find_optimizer_faults(options: DeepSpeedOptions, optimizer: object) -> list[str]:
    """Say where the optimizer of a configuration is not the one that was made for this run.

    DeepSpeed takes the made one and says nothing.

    Args:
        options: with or without a configuration.
        optimizer: with ``defaults``, as torch's have them.
    """
    config = read_config(options.config)
    if config is None:
        return []
    kind, given = config.at("optimizer.type"), config.at("optimizer.params") or {}
    made = type(optimizer).__name__
    if kind is not None and made.lower() not in _names(kind, given):
        both = f"optimizer.type={shown(kind)} in {config.source}, but the Trainer was given {made}"
        return [f"{both}: keep one of them"]
    defaults: Mapping[str, object] = getattr(optimizer, "defaults", {})
    return list(_hyper_parameters(config, given, made, defaults))


def checked_factory(
    options: DeepSpeedOptions, factory: OptimizerFactory | None
) -> OptimizerFactory | None:
    """The same factory, whose optimizer is compared with that of the configuration.

    The result raises InvalidArgument where the two are different.
    """
    if factory is None or options.config is None:
        return factory

    def make(groups: list[ParamGroup]) -> Optimizer:
        optimizer = factory(groups)
        faults = find_optimizer_faults(options, optimizer)
        if faults:
            raise InvalidArgument("; ".join(faults))
        return optimizer

    return make


def _hyper_parameters(
    config: Configuration, given: Mapping[str, Any], made: str, defaults: Mapping[str, object]
) -> Iterator[str]:
    for key, value in given.items():
        where = f"optimizer.params.{key}"
        if key not in defaults and key not in _DEEPSPEED_ONLY:
            yield f"{where} in {config.source} is no option of {made}{_meant(key, defaults)}"
        elif key in defaults and value != AUTO and not _same(value, defaults[key]):
            yield (
                f"{where}={shown(value)} in {config.source}, but {made} was made with "
                f'{key}={defaults[key]!r}: give both one value, or write "{AUTO}" there'
            )


def _meant(key: str, names: Iterable[str]) -> str:
    meant = did_you_mean(key, names)
    return f"; {meant}" if meant else ": delete it"


_DEEPSPEED_ONLY = (
    "adam_w_mode",
    "adamw_mode",
    "bias_correction",
    "fp32_optimizer_states",
    "set_grad_none",
    "torch_adam",
)
"""What only DeepSpeed's own optimizers take, beside what torch's have."""


def _names(kind: str, given: Mapping[str, Any]) -> set[str]:
    """The classes, in small letters, that an ``optimizer.type`` of DeepSpeed stands for."""
    name = kind.lower()
    if name == "adam":
        # DeepSpeed's "Adam" decays weights as AdamW does, unless it is told not to.
        names = {"adam"} if given.get("adam_w_mode") is False else {"adam", "adamw"}
    else:
        names = {name}
    return (
        names
        | {f"deepspeedcpu{one.removesuffix('w')}" for one in names}
        | {f"fused{one.removesuffix('w')}" for one in names}
    )


def _same(one: object, other: object) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return one == other
