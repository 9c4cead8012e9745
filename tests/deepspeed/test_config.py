"""What DeepSpeed is told: everything, and what a user's own configuration says as it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from tests.deepspeed.runs import bench_of, case_of, steps_of
from torchweld import Trainer, use
from torchweld.components import Settings
from torchweld.interfaces import Env
from torchweld.testing import models, run_ranks
from torchweld_deepspeed.config import find_notes, fit_buckets, make_config
from torchweld_deepspeed.imports import deepspeed_module
from torchweld_deepspeed.options import DeepSpeedOptions
from torchweld_deepspeed.reading import read_config
from torchweld_deepspeed.schema import (
    AIO,
    BF16,
    COMMS_LOGGER,
    DATA_TYPES,
    FP16,
    LEAF_MODULE,
    OFFLOAD_OPTIMIZER,
    OFFLOAD_PARAM,
    REMOVED,
    TOP,
    TORCH_AUTOCAST,
    ZERO,
)

CPU = Env(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
CUDA = Env(rank=0, world_size=1, local_rank=0, device=torch.device("cuda", 0))

# The two configurations of Transformers' documentation, which most users start from.
TRANSFORMERS_ZERO_2: Mapping[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
        "round_robin_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
TRANSFORMERS_ZERO_3: Mapping[str, Any] = {
    **TRANSFORMERS_ZERO_2,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
# What Accelerate writes for itself where its user answers questions.
ACCELERATE: Mapping[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 1,
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "nvme_path": None},
        "offload_param": {"device": "none", "nvme_path": None},
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "gradient_clipping": 1.0,
    "steps_per_print": float("inf"),
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "zero_allow_untested_optimizer": True,
}
# What Lightning's documentation shows for DeepSpeedStrategy(config=...).
LIGHTNING: Mapping[str, Any] = {
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "contiguous_gradients": True,
        "overlap_comm": True,
        "allgather_bucket_size": 2e8,
        "reduce_bucket_size": 2e8,
    },
}
FOUND = {
    "Transformers, ZeRO 2": TRANSFORMERS_ZERO_2,
    "Transformers, ZeRO 3": TRANSFORMERS_ZERO_3,
    "Accelerate": ACCELERATE,
    "Lightning": LIGHTNING,
}


def told(config: Any = None, settings: Settings | None = None, **options: Any) -> dict[str, Any]:
    """What the engine gets."""
    made = DeepSpeedOptions(config=config, **options)
    return make_config(made, settings or Settings(), CPU)


def parsed(config: dict[str, Any]) -> Any:
    """The configuration as DeepSpeed itself reads it."""
    return deepspeed_module("deepspeed.runtime.config").DeepSpeedConfig(config)


def leaves(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


# ---- nothing is left to a default ----------------------------------------------------------------


def test_clipping_is_off_unless_the_trainer_asks_for_it() -> None:
    assert parsed(told()).gradient_clipping == 0.0
    assert parsed(told(settings=Settings(gradient_clip_val=0.5))).gradient_clipping == 0.5
    # Without the key DeepSpeed clips, and does not say so.
    assert parsed({"train_batch_size": 1}).gradient_clipping == 1.0


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["32", "bf16", "bf16-true", "16"])
def test_deepspeed_reads_every_configuration_that_is_made(stage: int, precision: Any) -> None:
    config = told(settings=Settings(precision=precision), stage=stage)

    read = parsed(config)

    assert read.zero_optimization_stage == stage
    assert read.bfloat16_config.enabled is (precision == "bf16-true")
    assert read.float16_config.enabled is (precision == "16")
    assert read.torch_autocast_enabled is (precision == "bf16")
    assert read.managed_gradient_accumulation is False


def test_every_setting_of_zero_that_changes_numbers_or_memory_is_written() -> None:
    known = set(ZERO) - {name.removeprefix("stage3_") for name in ZERO if "stage3_" in name}
    left_out = known - set(told()["zero_optimization"])

    assert left_out == {
        # deprecated, refused, or about files that DeepSpeed never writes here
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "legacy_stage1",
        "load_from_fp32_weights",
        "pipeline_loading_checkpoint",
        "stage3_gather_fp16_weights_on_model_save",
        "zenflow",
        # without a value that is "off"
        "enable_sanity_checks",
        "leaf_module",
        "log_trace_cache_warnings",
        "override_module_apply",
        "save_muon_momentum_buffer_in_memory",
        "stage3_allgather_sequential",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
    }


def test_autocast_exchanges_gradients_in_fp32_unless_an_option_says_bf16() -> None:
    settings = Settings(precision="bf16")

    whole = parsed(told(settings=settings))
    reduced = parsed(told(settings=settings, communication_dtype="bf16"))

    assert whole.torch_autocast_lower_precision_safe_modules == []
    assert "torch.nn.modules.linear.Linear" in reduced.torch_autocast_lower_precision_safe_modules
    # None stands for DeepSpeed's own list, which is what the option gives.
    default = parsed({"train_batch_size": 1, "torch_autocast": {"enabled": True}})
    assert default.torch_autocast_lower_precision_safe_modules is None
    autocast = deepspeed_module("deepspeed.runtime.torch_autocast")
    own = autocast.get_default_autocast_lower_precision_modules()
    assert own == reduced.torch_autocast_lower_precision_safe_modules


def test_host_memory_is_pinned_where_there_is_a_gpu() -> None:
    options = DeepSpeedOptions(stage=3, offload_optimizer="cpu", offload_params="cpu")

    on_cpu, on_gpu = (make_config(options, Settings(), env) for env in (CPU, CUDA))

    for section in ("offload_optimizer", "offload_param"):
        assert on_cpu["zero_optimization"][section] == {"device": "cpu", "pin_memory": False}
        assert on_gpu["zero_optimization"][section] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("elements", "bucket"), [(6_803_455, 6_803_456), (1, 2), (10**9, 5 * 10**8)]
)
def test_buckets_are_even_and_no_larger_than_the_model(elements: int, bucket: int) -> None:
    config = told()

    fit_buckets(config, elements)

    assert config["zero_optimization"]["reduce_bucket_size"] == bucket
    assert config["zero_optimization"]["allgather_bucket_size"] == bucket


def test_a_bucket_of_the_users_is_kept_where_it_is_smaller() -> None:
    config = told({"zero_optimization": {"reduce_bucket_size": 1001, "allgather_bucket_size": 5e8}})

    fit_buckets(config, 10_000)

    assert config["zero_optimization"]["reduce_bucket_size"] == 1002
    assert config["zero_optimization"]["allgather_bucket_size"] == 10_000


# ---- a user's own --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUND)
def test_a_configuration_from_elsewhere_is_taken_as_it_is(name: str) -> None:
    trainer = Trainer(strategy=use("deepspeed", config=FOUND[name]))
    strategy = trainer.plan.strategy
    assert strategy is not None

    config = make_config(strategy.options, trainer.plan.settings, CPU)

    assert not trainer.plan.has_errors
    assert not [path for path, value in leaves(config) if value == "auto"]
    read, zero = parsed(config), FOUND[name]["zero_optimization"]
    assert read.zero_optimization_stage == zero["stage"]
    assert bool(read.zero_config.offload_optimizer) is (
        zero["offload_optimizer"]["device"] == "cpu"
    )


def test_what_a_configuration_says_becomes_the_option_or_the_setting() -> None:
    config = {
        **ACCELERATE,
        "gradient_accumulation_steps": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10},
    }
    trainer = Trainer(strategy=use("deepspeed", config=config))

    options = trainer.plan.strategy.options  # type: ignore[union-attr]  # it is there

    assert (options.stage, options.persistence_threshold) == (3, 10)
    settings = trainer.plan.settings
    assert settings.gradient_clip_val == 1.0
    assert settings.accumulate_grad_batches == 4
    assert settings.precision == "bf16-true"


def test_deepspeeds_own_adam_is_an_option_where_the_configuration_forces_it() -> None:
    config = {
        "zero_force_ds_cpu_optimizer": True,
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    }

    assert DeepSpeedOptions(config=config).cpu_adam is True
    assert DeepSpeedOptions(config={"zero_force_ds_cpu_optimizer": True}).cpu_adam is False


def test_what_has_no_option_is_passed_on() -> None:
    config = told(
        {
            "prescale_gradients": True,
            "gradient_predivide_factor": 2.0,
            "zero_optimization": {
                "reduce_scatter": False,
                "round_robin_gradients": True,
                "max_live_parameters": 1e6,
                "offload_optimizer": {"device": "cpu", "buffer_count": 7},
            },
            "fp16": {"enabled": "auto", "hysteresis": 3},
            "aio": {"block_size": 262144},
        }
    )

    assert config["prescale_gradients"] is True
    assert config["gradient_predivide_factor"] == 2.0
    assert config["zero_optimization"]["round_robin_gradients"] is True
    assert config["zero_optimization"]["stage3_max_live_parameters"] == 1_000_000
    assert config["zero_optimization"]["offload_optimizer"]["buffer_count"] == 7
    assert config["fp16"]["hysteresis"] == 3
    assert config["fp16"]["enabled"] is False
    assert config["aio"] == {"block_size": 262144}
    assert parsed(config).prescale_gradients is True


def test_auto_everywhere_is_the_same_as_nothing() -> None:
    def autos(section: Mapping[str, Any]) -> dict[str, Any]:
        return {k: autos(v) if isinstance(v, Mapping) else "auto" for k, v in section.items()}

    everything = {k: v for k, v in autos(TOP).items() if k != "bfloat16"}

    assert told(everything) == told()


def test_a_file_may_have_remarks_and_commas_before_brackets(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        "\ufeff{ // for the small cluster\n"
        '  "_remark": "see // the wiki, # 4",  # and this\n'
        '  "zero_optimization": {"stage": 3, /* all\n of it */ },\n'
        '  "gradient_clipping": 5e-1,\n}\n',
        encoding="utf-8",
    )

    config = read_config(path)

    assert config is not None
    assert dict(config) == {
        "_remark": "see // the wiki, # 4",
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 0.5,
    }


def test_two_files_with_one_content_have_one_digest(tmp_path: Path) -> None:
    one, other, third = tmp_path / "one.json", tmp_path / "other.json", tmp_path / "third.json"
    one.write_text('{"gradient_clipping": 0.5}', encoding="utf-8")
    other.write_text('{\n"gradient_clipping":\t0.5 }', encoding="utf-8")
    third.write_text('{"gradient_clipping": 0.25}', encoding="utf-8")

    digests = [
        Trainer(strategy=use("deepspeed", config=str(path))).plan.digest
        for path in (one, other, third)
    ]

    assert digests[0] == digests[1] != digests[2]


def test_a_configuration_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    options = DeepSpeedOptions(config=str(path))

    path.unlink()

    assert make_config(options, Settings(), CPU)["zero_optimization"]["stage"] == 3


def test_a_users_mapping_is_not_changed() -> None:
    given = json.loads(json.dumps(TRANSFORMERS_ZERO_3))

    fit_buckets(told(given), 100)

    assert given == TRANSFORMERS_ZERO_3


ODD: tuple[Any, ...] = (None, True, False, 0, 1, 2.5, -1, 1e30, float("inf"), "", "cpu", "fp32")
ODD += ("auto", [], ["a"], {}, {"enabled": True}, {"a": {"b": 1}}, 10**40)


def paths(section: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, kind in section.items():
        yield (*before, key)
        if isinstance(kind, Mapping):
            yield from paths(kind, (*before, key))


@pytest.mark.parametrize("path", list(paths(TOP)), ids=".".join)
def test_what_is_accepted_is_accepted_by_deepspeed(path: tuple[str, ...]) -> None:
    for value in ODD:
        config: Any = value
        for key in reversed(path):
            config = {key: config}
        try:
            made = told(config)
        except ValueError as error:
            assert path[-1] in str(error) or "stage" in str(error)  # noqa: PT017 - or it is parsed
        else:
            parsed(made)


# ---- what is passed on trains the same -----------------------------------------------------------


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


PASSED_ON: Mapping[str, tuple[tuple[int, ...], Mapping[str, Any]]] = {
    "whole reductions": (
        (1, 2, 3),
        zero(
            reduce_scatter=False,
            contiguous_gradients=False,
            allgather_partitions=False,
            use_multi_rank_bucket_allreduce=False,
        ),
    ),
    "another order": ((2,), zero(round_robin_gradients=True, parameter_alignment=True)),
    "overlap": ((2, 3), zero(overlap_comm=True, ignore_unused_parameters=False)),
    "small buckets": ((2, 3), zero(reduce_bucket_size=64, allgather_bucket_size=100)),
    "divided before": (
        (1, 3),
        {
            "prescale_gradients": True,
            "gradient_predivide_factor": 2.0,
            **zero(reduce_scatter=False),
        },
    ),
    "nothing ahead": (
        (3,),
        zero(
            sub_group_size=100,
            stage3_max_live_parameters=0,
            stage3_max_reuse_distance=0,
            stage3_prefetch_bucket_size=0,
        ),
    ),
    "other gathers": (
        (3,),
        zero(
            stage3_use_all_reduce_for_fetch_params=True,
            stage3_module_granularity_threshold=10,
            override_module_apply=False,
            enable_sanity_checks=True,
        ),
    ),
    "one by one": ((3,), zero(stage3_allgather_sequential=True, memory_efficient_linear=True)),
    "timing": (
        (2,),
        {
            "comms_logger": {"enabled": True},
            "timers": {"throughput": {"enabled": True}},
            "disable_python_gc": True,
            "wall_clock_breakdown": True,
        },
    ),
}


@pytest.fixture(scope="module")
def expected() -> Mapping[str, torch.Tensor]:
    """Weights and optimizer state after the same steps under DDP."""
    bench = bench_of("ddp", 2)
    return bench.train(case_of(bench, "mlp"), *steps_of("mlp"))[-1]


@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for name, row in PASSED_ON.items() for stage in row[0]]
)
def test_what_is_passed_on_trains_as_ddp_does(
    expected: Mapping[str, torch.Tensor], name: str, stage: int
) -> None:
    steps, by_zero = steps_of("mlp"), bench_of(f"zero{stage}", 2, config=PASSED_ON[name][1])

    found = by_zero.train(case_of(by_zero, "mlp"), *steps)[-1]

    assert found.keys() == expected.keys()  # optimizer state is found in any order of the pieces
    for key in expected:
        torch.testing.assert_close(found[key].float(), expected[key].float(), rtol=0, atol=1e-7)


def _fit(config: Mapping[str, Any]) -> float:
    """The loss at the end of a short training with AdamW."""
    inputs, targets = models.features(32)
    trainer = Trainer(
        strategy=use("deepspeed", config=config),
        data=use("torch", batch_size=4),
        max_epochs=15,
        barebones=True,
        seed=0,
    )
    data = TensorDataset(inputs, targets)
    trainer.fit(models.mlp(), data, loss=F.cross_entropy, optimizer=partial(AdamW, lr=1e-2))
    return trainer.evaluate(data=data)["loss"]


@pytest.mark.parametrize("name", FOUND)
def test_a_configuration_from_elsewhere_trains(name: str) -> None:
    losses = run_ranks(_fit, 2, FOUND[name], timeout_seconds=240)

    assert losses[0] == losses[1] < 0.5  # 1.9 for who knows nothing of seven classes


# ---- what is decided here is said ----------------------------------------------------------------

NOTES: Mapping[str, tuple[dict[str, Any], str]] = {
    "no clipping": ({"zero_optimization": {"stage": 2}}, "would clip at 1.0"),
    "no stage": ({"gradient_clipping": 1.0}, "would take stage 0"),
    "overlap on stage 1": (
        {"zero_optimization": {"stage": 1, "overlap_comm": True}},
        "DeepSpeed cannot with stage 1",
    ),
    "a checkpoint section": ({"checkpoint": {"load_universal": True}}, "checkpoints itself"),
    "a remark": ({"_why": "because"}, "'_why' in config is read as a remark"),
    "printing": ({"steps_per_print": 10}, "the Trainer logs"),
    "a patched linear": (
        {"zero_optimization": {"memory_efficient_linear": True}},
        "torch.nn.functional.linear is DeepSpeed's until the run ends",
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_is_done_otherwise_than_one_expects_is_a_note(name: str) -> None:
    config, expected = NOTES[name]

    notes = find_notes(DeepSpeedOptions(config=config))

    assert expected in "\n".join(f"{note.what} ({note.why})" for note in notes)


def test_nothing_is_noted_without_a_configuration() -> None:
    assert find_notes(DeepSpeedOptions()) == []


# ---- the tables are those of the installed release -----------------------------------------------

MODELS = {
    "deepspeed.runtime.zero.config:DeepSpeedZeroConfig": ZERO,
    "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadParamConfig": OFFLOAD_PARAM,
    "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig": OFFLOAD_OPTIMIZER,
    "deepspeed.runtime.zero.leaf_module_config:DeepSpeedZeroLeafModuleConfig": LEAF_MODULE,
    "deepspeed.comm.config:CommsLoggerConfig": COMMS_LOGGER,
    "deepspeed.runtime.precision_config:DeepSpeedBF16Config": BF16,
    "deepspeed.runtime.precision_config:DeepSpeedFP16Config": FP16,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_tables_name_the_keys_of_the_installed_deepspeed(name: str) -> None:
    module, _, attribute = name.partition(":")
    model = getattr(deepspeed_module(module), attribute)

    names = {n for key, field in model.model_fields.items() for n in (key, field.alias) if n}

    assert set(MODELS[name]) == names


def test_the_tables_name_the_words_that_the_installed_deepspeed_looks_up() -> None:
    constants = deepspeed_module("deepspeed.runtime.constants")
    swap = deepspeed_module("deepspeed.runtime.swap_tensor.constants")

    assert {value for key, value in vars(swap).items() if _is_key(key, "AIO_")} == set(AIO)
    words = {value for value in vars(constants).values() if isinstance(value, str)}
    assert set(TORCH_AUTOCAST) | set(DATA_TYPES) <= words
    read_elsewhere = set(TOP) - words
    assert all(_is_read(word) for word in read_elsewhere)


def _is_key(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and not name.endswith(("DEFAULT", "DICT", "FORMAT"))


def _is_read(word: str) -> bool:
    """Whether a module of DeepSpeed that reads configurations has this word in quotes."""
    root = Path(import_module("deepspeed").__file__ or "")
    folders = ("runtime", "comm", "monitor", "utils", "profiling", "autotuning", "datastates")
    sources = [path for name in folders for path in (root.parent / name).glob("**/*.py")]
    return any(f'"{word}"' in t or f"'{word}'" in t for t in map(_text, sources))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_removed_keys_are_those_of_the_installed_deepspeed() -> None:
    config = deepspeed_module("deepspeed.runtime.config")

    zero = {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}

    assert set(REMOVED) == set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) | zero


def test_a_configuration_is_checked_without_importing_deepspeed_or_torch() -> None:
    from subprocess import run

    code = (
        "import sys; from torchweld_deepspeed.options import DeepSpeedOptions as Options;"
        "Options(config={'zero_optimization': {'stage': 3}});"
        "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )

    assert run([sys.executable, "-c", code], check=False).returncode == 0
