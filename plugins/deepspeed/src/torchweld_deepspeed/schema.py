"""The keys that DeepSpeed 0.19 reads in a configuration, and what their values have to be.

Plain data, so that a plan can be checked without importing deepspeed (which takes seconds). A test
compares these tables with the models and constants of the installed release.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Union

AUTO = "auto"
"""How users of Transformers and Accelerate write "what the trainer says"."""


@dataclass(frozen=True)
class Kind:
    """What a value has to be.

    Attributes:
        says: the values that fit, as they complete "… is not ___".
        fits: whether a value is one of them.
    """

    says: str
    fits: Callable[[Any], bool]


Section = Mapping[str, Union[Kind, "Section"]]


def is_number(value: object) -> bool:
    """Whether ``value`` is an ordinary number; ``True`` and NaN are none."""
    if isinstance(value, float):
        return not math.isnan(value)
    return isinstance(value, int) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number; ``5e8`` is one, ``2.5`` and ``True`` are none."""
    return value.is_integer() if isinstance(value, float) else is_number(value)


def is_finite(value: object) -> bool:
    """Whether ``value`` is a number that is not endless."""
    return is_number(value) and value not in (math.inf, -math.inf)


def one_of(*choices: str) -> Kind:
    """One of these words, spelled as DeepSpeed has them."""
    return Kind(" or ".join(map(repr, choices)), lambda value: value in choices)


def or_null(kind: Kind) -> Kind:
    """The same, or ``null``."""
    return Kind(f"{kind.says} or null", lambda value: value is None or kind.fits(value))


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a whole number >= 1", lambda value: is_whole(value) and value >= 1)
SIZE = Kind("a whole number >= 0", lambda value: is_whole(value) and value >= 0)
NOT_NEGATIVE = Kind("a number >= 0", lambda value: is_finite(value) and value >= 0)
POSITIVE = Kind("a number > 0", lambda value: is_finite(value) and value > 0)
FRACTION = Kind("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind(
    "a list of texts",
    lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
)
TABLE = Kind("a table of keys", lambda value: isinstance(value, dict))
ANYTHING = Kind("anything", lambda _: True)
DTYPE = one_of("fp32", "fp16", "bf16")
STEPS = Kind("a number >= 1", lambda value: is_number(value) and value >= 1)

PIECES: Section = {
    "buffer_count": SIZE,
    "nvme_path": or_null(TEXT),
    "pin_memory": FLAG,
}
OFFLOAD_PARAM: Section = {
    **PIECES,
    "device": one_of("none", "cpu", "nvme"),
    "buffer_size": SIZE,
    "max_in_cpu": SIZE,
}
OFFLOAD_OPTIMIZER: Section = {
    **PIECES,
    "device": one_of("none", "cpu", "nvme"),
    "pipeline_read": FLAG,
    "pipeline_write": FLAG,
    "fast_init": FLAG,
    "ratio": FRACTION,
    "super_offload": FLAG,
    "cpuadam_cores_perc": FRACTION,
}
LEAF_MODULE: Section = {"classes": TEXTS, "names": TEXTS, "name_suffixes": TEXTS}
ZERO: Section = {
    "stage": Kind("0, 1, 2 or 3", lambda value: is_whole(value) and 0 <= value <= 3),
    "contiguous_gradients": FLAG,
    "reduce_scatter": FLAG,
    "reduce_bucket_size": COUNT,
    "use_multi_rank_bucket_allreduce": FLAG,
    "allgather_partitions": FLAG,
    "allgather_bucket_size": SIZE,
    "overlap_comm": or_null(FLAG),
    "compute_grad_norm": FLAG,
    "load_from_fp32_weights": FLAG,
    "elastic_checkpoint": FLAG,
    "offload_param": OFFLOAD_PARAM,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "zenflow": or_null(TABLE),
    "sub_group_size": SIZE,
    "cpu_offload": FLAG,
    "cpu_offload_param": FLAG,
    "cpu_offload_use_pin_memory": FLAG,
    "stage3_prefetch_bucket_size": SIZE,
    "stage3_param_persistence_threshold": SIZE,
    "stage3_model_persistence_threshold": SIZE,
    "stage3_max_live_parameters": SIZE,
    "stage3_max_reuse_distance": SIZE,
    "stage3_gather_16bit_weights_on_model_save": FLAG,
    "stage3_gather_fp16_weights_on_model_save": FLAG,
    "stage3_module_granularity_threshold": SIZE,
    "stage3_use_all_reduce_for_fetch_params": FLAG,
    "stage3_allgather_sequential": FLAG,
    "prefetch_bucket_size": SIZE,
    "param_persistence_threshold": SIZE,
    "model_persistence_threshold": SIZE,
    "max_live_parameters": SIZE,
    "max_reuse_distance": SIZE,
    "gather_16bit_weights_on_model_save": FLAG,
    "module_granularity_threshold": SIZE,
    "use_all_reduce_for_fetch_params": FLAG,
    "allgather_sequential": FLAG,
    "ignore_unused_parameters": FLAG,
    "legacy_stage1": FLAG,
    "round_robin_gradients": FLAG,
    "parameter_alignment": FLAG,
    "zero_hpz_partition_size": SIZE,
    "zero_quantized_weights": FLAG,
    "zero_quantized_nontrainable_weights": FLAG,
    "zero_quantized_gradients": FLAG,
    "memory_efficient_linear": FLAG,
    "pipeline_loading_checkpoint": FLAG,
    "override_module_apply": FLAG,
    "log_trace_cache_warnings": FLAG,
    "enable_sanity_checks": FLAG,
    "save_muon_momentum_buffer_in_memory": FLAG,
    "leaf_module": LEAF_MODULE,
}
SHORT_NAMES: Mapping[str, str] = {
    name.removeprefix("stage3_"): name
    for name in ZERO
    if name.startswith("stage3_") and name.removeprefix("stage3_") in ZERO
}
"""DeepSpeed reads these names of stage 3 without their beginning too."""

BF16: Section = {
    "enabled": FLAG,
    "immediate_grad_update": FLAG,
    "check_grad_overflow": FLAG,
    "bf16_master_weights_and_grads": FLAG,
    "bf16_optimizer_states": FLAG,
}
FP16: Section = {
    "enabled": FLAG,
    "auto_cast": FLAG,
    "loss_scale": NOT_NEGATIVE,
    "initial_scale_power": SIZE,
    "loss_scale_window": COUNT,
    "hysteresis": SIZE,
    "consecutive_hysteresis": FLAG,
    "min_loss_scale": COUNT,
    "fp16_master_weights_and_grads": FLAG,
}
HALF = ("fp16", "float16", "torch.float16", "half")
"""How ``torch_autocast.dtype`` spells fp16."""

TORCH_AUTOCAST: Section = {
    "enabled": FLAG,
    "dtype": one_of("bf16", "bfloat16", "torch.bfloat16", *HALF),
    "lower_precision_safe_modules": TEXTS,
}
DATA_TYPES: Section = {
    "grad_accum_dtype": or_null(DTYPE),
    "param_dtype": or_null(DTYPE),
    "buffer_dtype": or_null(DTYPE),
    "keep_in_fp32_modules": TEXTS,
}
AIO: Section = {
    "block_size": COUNT,
    "queue_depth": COUNT,
    "intra_op_parallelism": COUNT,
    "single_submit": FLAG,
    "overlap_events": FLAG,
    "use_gds": FLAG,
}
COMMS_LOGGER: Section = {
    "enabled": FLAG,
    "prof_all": FLAG,
    "prof_ops": TEXTS,
    "verbose": FLAG,
    "debug": FLAG,
}
OPTIMIZER: Section = {"type": TEXT, "params": TABLE, "legacy_fusion": FLAG}
SCHEDULER: Section = {"type": or_null(TEXT), "params": TABLE}

TOP: Section = {
    "train_batch_size": COUNT,
    "train_micro_batch_size_per_gpu": COUNT,
    "gradient_accumulation_steps": COUNT,
    "managed_gradient_accumulation": FLAG,
    "gradient_clipping": NOT_NEGATIVE,
    "optimizer": OPTIMIZER,
    "scheduler": SCHEDULER,
    "zero_optimization": ZERO,
    "zero_allow_untested_optimizer": FLAG,
    "zero_force_ds_cpu_optimizer": FLAG,
    "bf16": BF16,
    "bfloat16": BF16,
    "fp16": FP16,
    "torch_autocast": TORCH_AUTOCAST,
    "data_types": DATA_TYPES,
    "communication_data_type": or_null(DTYPE),
    "seq_parallel_communication_data_type": or_null(DTYPE),
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": POSITIVE,
    "gradient_allreduce_op": one_of("mean", "sum"),
    "disable_allgather": FLAG,
    "steps_per_print": or_null(STEPS),
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "disable_python_gc": FLAG,
    "log_level": ANYTHING,
    "vocabulary_size": or_null(COUNT),
    "dataloader_drop_last": FLAG,
    "use_data_before_expert_parallelism": FLAG,
    "aio": AIO,
    "checkpoint": TABLE,
    "activation_checkpointing": TABLE,
    "comms_logger": COMMS_LOGGER,
    "tensorboard": TABLE,
    "wandb": TABLE,
    "csv_monitor": TABLE,
    "comet": TABLE,
    "flops_profiler": TABLE,
    "autotuning": TABLE,
    "hybrid_engine": TABLE,
    "pipeline": TABLE,
    "data_efficiency": TABLE,
    "datastates_ckpt": ANYTHING,
    "weight_quantization": TABLE,
    "compile": TABLE,
    "timers": {"throughput": {"enabled": FLAG, "synchronized": FLAG}},
    "tensor_parallel": TABLE,
    "expert_parallel": TABLE,
    "sequence_parallel_size": COUNT,
}
"""Every key of a configuration's outermost table."""

REMOVED: Mapping[str, str] = {
    "amp": "precision='bf16' or '16' takes its place",
    "compression_training": "models are trained as they are",
    "curriculum_learning": "give the data source the order you want",
    "eigenvalue": "nothing takes its place",
    "elasticity": "resume from a checkpoint on any number of processes",
    "graph_harvesting": "compile=True takes its place",
    "nebula": "torchweld writes checkpoints itself",
    "progressive_layer_drop": "a surgery can drop layers",
    "quantize_training": "nothing takes its place",
    "sparse_attention": "use an attention of torch",
    "sparse_gradients": "an embedding made with sparse=True needs no key",
    "zero_optimization.mics_hierarchical_params_gather": "nothing takes its place",
    "zero_optimization.mics_shard_size": "nothing takes its place",
    "zero_optimization.zeropp_loco_param": "nothing takes its place",
}
"""Keys that DeepSpeed 0.19 refuses because the feature is gone, and what to do without it."""
