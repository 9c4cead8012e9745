"""The configuration that the engine gets: every setting that changes numbers, also "off".

DeepSpeed's own defaults are not those of PyTorch (without a key it clips at 1.0, exchanges 5e8
elements at once, skips steps in bf16, sends gradients of autocast layers in bf16), so nothing is
left to them. What a user's configuration says beyond that is passed on as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torchweld_deepspeed.checking import is_remark
from torchweld_deepspeed.reading import Configuration, read_config
from torchweld_deepspeed.schema import AUTO, SHORT_NAMES, is_whole

if TYPE_CHECKING:
    from torchweld.components import Settings
    from torchweld.interfaces import Env
    from torchweld_deepspeed.options import DeepSpeedOptions, UserConfig

LARGEST_BUCKET = 500_000_000
"""Elements exchanged at once in DeepSpeed's own configuration: 2000 MB of fp32."""
LARGEST_PREFETCH = 50_000_000
ELEMENTS_AT_ONCE = 1_000_000_000

SENT_IN_BF16 = (
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.conv.Conv1d",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.conv.Conv3d",
)
"""Layers whose gradients DeepSpeed exchanges in reduced precision under autocast by itself."""

OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "managed_gradient_accumulation",
    "steps_per_print",
    "optimizer",
    "scheduler",
    "bfloat16",
    "communication_data_type",
    "checkpoint",
    "dataloader_drop_last",
    "vocabulary_size",
    # Refused where they are on.
    "autotuning",
    "comet",
    "compile",
    "csv_monitor",
    "data_efficiency",
    "datastates_ckpt",
    "expert_parallel",
    "flops_profiler",
    "hybrid_engine",
    "pipeline",
    "sequence_parallel_size",
    "tensor_parallel",
    "tensorboard",
    "wandb",
    "weight_quantization",
)
"""Keys that the Trainer decides or torchweld does itself; not passed on."""


class Note(NamedTuple):
    """What is decided here and silent in DeepSpeed, and why; as ``Claims.settles`` has them."""

    what: str
    why: str


def make_config(
    options: DeepSpeedOptions, settings: Settings, env: Env, user_config: UserConfig = None
) -> dict[str, Any]:
    """Return everything that DeepSpeed is told; ``fit_buckets`` then fits it to a model.

    Args:
        options: which have taken what the configuration says.
        settings: of the Trainer, which have too.
        env: whose device decides whether host memory is pinned.
        user_config: the user's own; None: that of the options.
    """
    user = read_config(user_config) or read_config(options.config)
    on_gpu = env.device.type == "cuda"
    return _over(_base(options, settings, on_gpu=on_gpu), _passed_on(user))


def fit_buckets(config: MutableMapping[str, Any], num_elements: int) -> None:
    """Make no bucket larger than the model, in place: DeepSpeed allocates what it is told.

    Args:
        config: of ``make_config``.
        num_elements: elements of all trained parameters. An odd size fails on stages 1 and 2.
    """
    zero = config["zero_optimization"]
    whole = max(2, num_elements + num_elements % 2)
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        zero[key] = min(zero[key] + zero[key] % 2, whole)


def _base(options: DeepSpeedOptions, settings: Settings, *, on_gpu: bool) -> dict[str, Any]:
    """What is told without a user's configuration."""
    return {
        # Bookkeeping only: the loop's windows and batches are its own.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Without this key it would clip at 1.0.
        "gradient_clipping": float(settings.gradient_clip_val or 0.0),
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": _communication(options, settings),
        "steps_per_print": None,  # 0 divides by zero
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "disable_allgather": False,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        # The optimizers that ZeRO trains wrongly are refused before.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": options.cpu_adam,
        **_precision(options, settings),
        "zero_optimization": _zero(options, on_gpu=on_gpu),
    }


def _precision(options: DeepSpeedOptions, settings: Settings) -> dict[str, Any]:
    autocast = settings.precision == "bf16"
    reduced = autocast and options.communication_dtype == "bf16"
    return {
        "bf16": {
            "enabled": settings.precision == "bf16-true",
            "immediate_grad_update": False,
            # PyTorch does not skip a step whose gradients are not finite; nor is it told here.
            "check_grad_overflow": False,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {
            "enabled": settings.precision == "16",
            "auto_cast": False,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 2000,
            "hysteresis": 1,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
            "fp16_master_weights_and_grads": False,
        },
        "torch_autocast": {
            "enabled": autocast,
            "dtype": "bfloat16",
            # Left out, gradients of linear and convolution layers would be exchanged in bf16.
            "lower_precision_safe_modules": list(SENT_IN_BF16) if reduced else [],
        },
    }


def _communication(options: DeepSpeedOptions, settings: Settings) -> str:
    """The dtype of gradients on the wire: that of the parameters, unless told otherwise."""
    own = {"bf16-true": "bf16", "16": "fp16"}.get(settings.precision)
    if own is None:
        return "fp32"  # DeepSpeed ignores another one where parameters are fp32
    return options.communication_dtype or own


def _zero(options: DeepSpeedOptions, *, on_gpu: bool) -> dict[str, Any]:
    bucket = options.bucket_elements or LARGEST_BUCKET
    return {
        "stage": options.stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_partitions": True,
        "allgather_bucket_size": bucket,
        "use_multi_rank_bucket_allreduce": True,
        "overlap_comm": options.overlap_comm and options.stage != 1,
        "compute_grad_norm": True,
        "round_robin_gradients": False,
        "parameter_alignment": False,
        "ignore_unused_parameters": True,
        "sub_group_size": ELEMENTS_AT_ONCE,
        # True would leave torch.nn.functional.linear replaced for the whole process.
        "memory_efficient_linear": False,
        "stage3_prefetch_bucket_size": min(bucket, LARGEST_PREFETCH),
        "stage3_param_persistence_threshold": options.persistence_threshold,
        "stage3_max_live_parameters": ELEMENTS_AT_ONCE,
        "stage3_max_reuse_distance": ELEMENTS_AT_ONCE,
        "stage3_gather_16bit_weights_on_model_save": False,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "offload_optimizer": _offload(options.offload_optimizer, options, pins=on_gpu),
        "offload_param": _offload(options.offload_params, options, pins=on_gpu),
    }


def _offload(device: str | None, options: DeepSpeedOptions, *, pins: bool) -> dict[str, Any] | None:
    if device is None:
        return None
    path = {"nvme_path": options.nvme_path} if device == "nvme" else {}
    return {"device": device, "pin_memory": pins, **path}


def _passed_on(config: Configuration | None) -> dict[str, Any]:
    """What a user's configuration adds: not what is decided elsewhere, nor "auto" or remarks."""
    if config is None:
        return {}
    added = {key: _stripped(value) for key, value in config.items() if key not in OURS}
    if "bfloat16" in config:
        added["bf16"] = _stripped(config["bfloat16"])
    added = {key: value for key, value in added.items() if _says_something(key, value)}
    if isinstance(added.get("zero_optimization"), dict):
        added["zero_optimization"] = _zero_passed_on(added["zero_optimization"])
    for section in ("bf16", "fp16", "torch_autocast"):
        if section in added:  # whether it is on is the Trainer's precision, which agrees
            added[section].pop("enabled", None)
    added.get("torch_autocast", {}).pop("dtype", None)
    return added


def _zero_passed_on(zero: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ZeRO under their full names, without those that became options."""
    named = {SHORT_NAMES.get(key, key): value for key, value in zero.items()}
    off = [key for key in _OFFLOADS if named.get(key, {}).get("device", "none") == "none"]
    return {key: value for key, value in named.items() if key not in (*_OPTIONS, *off)}


_OFFLOADS = ("offload_optimizer", "offload_param")


_OPTIONS = (
    "stage",
    "overlap_comm",
    "stage3_param_persistence_threshold",
    "reduce_bucket_size",
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "zenflow",
)


def _stripped(value: Any) -> Any:
    """A table without its "auto" values, remarks and empty sections; ``5e8`` as a whole number."""
    if isinstance(value, dict):
        inner = {key: _stripped(item) for key, item in value.items()}
        return {key: item for key, item in inner.items() if _says_something(key, item)}
    return int(value) if isinstance(value, float) and is_whole(value) and value > 1 else value


def _says_something(key: str, value: object) -> bool:
    return value not in (AUTO, None, {}) and not is_remark(key)


def _over(base: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """Put one table over another, table by table."""
    merged = dict(base)
    for key, value in added.items():
        under = merged.get(key)
        merged[key] = (
            _over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
        )
    return merged


# ---- notes of the plan ---------------------------------------------------------------------------


def find_notes(options: DeepSpeedOptions) -> list[Note]:
    """What is done otherwise than a user's configuration makes one expect, for the plan."""
    config = read_config(options.config)
    return [] if config is None else list(_notes(config, options))


def _notes(config: Configuration, options: DeepSpeedOptions) -> Iterator[Note]:
    where = config.source
    yield from _missing(config, options)
    if config.at("zero_optimization.overlap_comm") is True and options.stage == 1:
        what = f"overlap_comm=true in {where} stays off"
        yield Note(what, "DeepSpeed cannot with stage 1 where the loop owns its windows")
    if config.at("zero_optimization.memory_efficient_linear") is True:
        what = "torch.nn.functional.linear is DeepSpeed's until the run ends"
        yield Note(what, f"memory_efficient_linear=true in {where}")
    for path, why in _UNUSED.items():
        if config.at(path):
            yield Note(f"{path} in {where} has no effect", why)
    for key in filter(is_remark, config):
        yield Note(f"{key!r} in {where} is read as a remark", "DeepSpeed has no such key")


def _missing(config: Configuration, options: DeepSpeedOptions) -> Iterator[Note]:
    """Keys whose default in DeepSpeed is not what is done here."""
    where = config.source
    if config.at("gradient_clipping") is None:
        what = f"gradients are clipped as the Trainer says; {where} does not say"
        yield Note(what, "DeepSpeed would clip at 1.0 where the key is left out")
    if config.at("zero_optimization.stage") is None:
        what = f"stage {options.stage}; {where} does not say"
        yield Note(what, "DeepSpeed would take stage 0, which shards nothing")


_UNUSED: Mapping[str, str] = {
    "checkpoint": "torchweld writes and reads checkpoints itself",
    "dataloader_drop_last": "drop_last is an option of the data source",
    "steps_per_print": "the Trainer logs; verbose=True shows what DeepSpeed prints",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "torchweld exports weights "
    "from the shards",
    "zero_optimization.load_from_fp32_weights": "torchweld reads checkpoints itself",
    "vocabulary_size": "DeepSpeed only warns about it",
}
