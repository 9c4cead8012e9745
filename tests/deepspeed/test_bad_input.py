"""A configuration that DeepSpeed takes in silence, or fails on in the middle, is an error before.

Each row of ``SILENT`` is shown to be silent in DeepSpeed itself, and each row of ``LATE`` to fail
there once the engine is made (``LATER``: when it is used); all are one sentence while planning.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW

from torchweld import Trainer, use
from torchweld.components import Settings
from torchweld.errors import PlanError
from torchweld.interfaces import RunFacts
from torchweld.testing import models, run_ranks
from torchweld_deepspeed.checking import REFUSED
from torchweld_deepspeed.imports import deepspeed_module
from torchweld_deepspeed.merging import find_batch_faults, find_optimizer_faults
from torchweld_deepspeed.options import DeepSpeedOptions
from torchweld_deepspeed.schema import ANYTHING, TOP

Row = tuple[Mapping[str, Any], str]
"""What a user writes, and what the answer has to say."""

DRIVE = {"device": "nvme", "nvme_path": "/data"}
SILENT: Mapping[str, Row] = {
    "a misspelled key": ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'?"),
    "a key in the wrong table": (
        {"reduce_bucket_size": 1000},
        "did you mean 'zero_optimization.reduce_bucket_size'?",
    ),
    "a key of nobody": ({"horses": 3}, "'horses' is no key of DeepSpeed's, so it would do nothing"),
    "a misspelled key of autocast": (
        {"torch_autocast": {"enable": True}},
        "did you mean 'torch_autocast.enabled'?",
    ),
    "clipping below zero": ({"gradient_clipping": -1}, "gradient_clipping=-1 is not a number >= 0"),
    "half a sample": (
        {"train_micro_batch_size_per_gpu": 2.5},
        "train_micro_batch_size_per_gpu=2.5 is not a whole number >= 1",
    ),
    "stage 1 by true": ({"zero_optimization": True}, 'write {"stage": 1}'),
    "a stage in quotes": ({"zero_optimization": {"stage": "2"}}, "stage='2' is not 0, 1, 2 or 3"),
    "parameters offloaded on stage 2": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "offload_params='cpu' with stage=2: only stage 3 can",
    ),
    "a drive on stage 2": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": DRIVE}},
        "offload_optimizer='nvme' with stage=2: only stage 3 keeps it on a drive",
    ),
    "sums instead of means": ({"gradient_allreduce_op": "sum"}, "would grow with the number of"),
    "counted windows": ({"managed_gradient_accumulation": True}, "windows would drift"),
    "clipping in the optimizer": (
        {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}},
        "gradient_clipping is the key",
    ),
    "a scheduler": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}},
        "scheduler.type='WarmupLR': torchweld's loop steps the schedule, so give lr_scheduler=",
    ),
    "two names of bf16": (
        {"bf16": {"enabled": True}, "bfloat16": {"enabled": False}},
        "bf16 and bfloat16 mean the same",
    ),
    "fp16 beside autocast": (
        {"fp16": {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": "bf16"}},
        "both true",
    ),
    "autocast to fp16": (
        {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        "so use fp16.enabled",
    ),
    "a second copy of the weights": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        "second copy of the weights",
    ),
    "a log that nobody asked for": ({"tensorboard": {"enabled": True}}, "Trainer(logger=...)"),
}
LATE: Mapping[str, Row] = {
    "no table": ({"zero_optimization": None}, "zero_optimization=null is not a table of keys"),
    "an unknown key of ZeRO": (
        {"zero_optimization": {"stagee": 2}},
        "did you mean 'zero_optimization.stage'?",
    ),
    "an unknown key of offloading": (
        {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
        "did you mean 'zero_optimization.offload_optimizer.device'?",
    ),
    "stage 4": ({"zero_optimization": {"stage": 4}}, "stage=4 is not 0, 1, 2 or 3"),
    "stage -1": ({"zero_optimization": {"stage": -1}}, "stage=-1 is not 0, 1, 2 or 3"),
    "a stage in words": ({"zero_optimization": {"stage": "two"}}, "'two' is not 0, 1, 2 or 3"),
    "offloading to a GPU": (
        {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
        "device='gpu' is not 'none' or 'cpu' or 'nvme'",
    ),
    "an unknown dtype": ({"communication_data_type": "foo"}, "is not 'fp32' or 'fp16' or 'bf16'"),
    "no micro batch": (
        {"train_micro_batch_size_per_gpu": 0},
        "train_micro_batch_size_per_gpu=0 is not a whole number >= 1",
    ),
    "no window": (
        {"gradient_accumulation_steps": 0},
        "gradient_accumulation_steps=0 is not a whole number >= 1",
    ),
    "sizes that do not fit": (
        {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4},
        "train_batch_size=10 is no multiple of train_micro_batch_size_per_gpu=4",
    ),
    "bf16 and fp16": (
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        "bf16.enabled and fp16.enabled are both true: keep one of them",
    ),
    "a bucket of nothing": (
        {"zero_optimization": {"reduce_bucket_size": 0}},
        "reduce_bucket_size=0 is not a whole number >= 1",
    ),
    "what is gone": ({"amp": {"enabled": True}}, "amp is gone from DeepSpeed 0.19: delete it"),
}
LATER: Mapping[str, Row] = {
    "clipping in quotes": ({"gradient_clipping": "0.5"}, "gradient_clipping='0.5' is not a number"),
    "clipping by null": ({"gradient_clipping": None}, "gradient_clipping=null is not a number"),
    "clipping without end": (
        {"gradient_clipping": float("inf")},
        "gradient_clipping=inf is not a number >= 0",
    ),
    "printing every 0 steps": ({"steps_per_print": 0}, "steps_per_print=0 is not a number >= 1"),
    "gradients divided before": (
        {"prescale_gradients": True, "zero_optimization": {"stage": 3}},
        "prescale_gradients=true with stage=3 needs zero_optimization.reduce_scatter=false",
    ),
    "gradients kept in fp32 on stage 1": (
        {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}},
        "whose pieces torchweld cannot save",
    ),
    "no path on nvme": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "'nvme' needs nvme_path",
    ),
}
ROWS = {**SILENT, **LATE, **LATER}


def read_by_deepspeed(config: Mapping[str, Any]) -> Any:
    """What DeepSpeed makes of a configuration that has the batch size which it asks for."""
    sized = {} if "train_batch_size" in config else {"train_micro_batch_size_per_gpu": 4}
    made = deepspeed_module("deepspeed.runtime.config")
    return made.DeepSpeedConfig(json.loads(json.dumps({**sized, **config})))


@pytest.mark.parametrize("name", [*SILENT, *LATER])
def test_deepspeed_itself_takes_it(name: str) -> None:
    read_by_deepspeed(ROWS[name][0])


@pytest.mark.parametrize("name", LATE)
def test_deepspeed_itself_fails_on_it_when_the_engine_is_made(name: str) -> None:
    errors = deepspeed_module("deepspeed.runtime.config").DeepSpeedConfigError
    with pytest.raises((ValueError, TypeError, AssertionError, errors)):
        read_by_deepspeed(LATE[name][0])


@pytest.mark.parametrize("name", ROWS)
def test_it_is_an_error_of_the_plan(name: str) -> None:
    config, expected = ROWS[name]
    trainer = Trainer(strategy=use("deepspeed", config=config))

    with pytest.raises(PlanError) as raised:
        trainer.plan.raise_for_problems()

    assert [problem.code for problem in raised.value.problems] == ["TW103"]
    assert expected in raised.value.problems[0].why


def test_stage_auto_is_our_default_where_deepspeed_takes_none() -> None:
    config = {"zero_optimization": {"stage": "auto"}}

    assert read_by_deepspeed(config).zero_optimization_stage == 0
    assert DeepSpeedOptions(config=config).stage == 2
    assert DeepSpeedOptions(stage=3, config=config).stage == 3


def test_everything_that_is_wrong_is_said_at_once() -> None:
    config = {"gradient_cliping": 1, "zero_optimization": {"stage": 7, "overlap": True}}

    with pytest.raises(ValueError, match="stage=7") as raised:
        DeepSpeedOptions(config=config)

    assert str(raised.value).count(";") >= 2
    assert "'gradient_clipping'" in str(raised.value)


@pytest.mark.parametrize("path", REFUSED)
def test_what_is_refused_says_why(path: str) -> None:
    *tables, key = path.split(".")
    config: Any = {key: refused_value(path)}
    for table in reversed(tables):
        config = {table: config}

    with pytest.raises(ValueError, match=re.escape(REFUSED[path].why)):
        DeepSpeedOptions(config=config)


def refused_value(path: str) -> object:
    """A value that DeepSpeed takes at ``path``, and this plugin does not."""
    kind: Any = TOP
    for key in path.split("."):
        # What is in a table of free form, such as an optimizer's, may be anything.
        kind = kind[key] if isinstance(kind, Mapping) else ANYTHING
    values = ({"enabled": True}, True, False, 2, 0.5, "sum", "float16", "fp32")
    return next(v for v in values if kind.fits(v) and REFUSED[path].meets(v))


@pytest.mark.parametrize(
    ("options", "precision", "code"),
    [
        ({"stage": 0}, "32", "TW103"),
        ({"config": {"zero_optimization": {"stage": 0}}}, "32", "TW103"),
        ({"zero_init": True}, "32", "TW103"),
        ({"communication_dtype": "bf16"}, "32", "TW301"),
        ({"config": {"communication_data_type": "bf16"}}, "32", "TW301"),
        ({"stage": 1, "overlap_comm": True}, "32", "TW103"),
        ({"offload_params": "cpu"}, "32", "TW103"),
        ({"stage": 1, "offload_optimizer": "nvme", "nvme_path": "/data"}, "32", "TW103"),
        ({"config": {"zero_optimization": {"offload_optimizer": DRIVE}}}, "32", "TW103"),
        ({"stage": 3, "offload_optimizer": "nvme"}, "32", "TW103"),
        ({"nvme_path": "/data"}, "32", "TW103"),
        ({"bucket_elements": 0}, "32", "TW103"),
        ({"persistence_threshold": -1}, "32", "TW103"),
        ({"communication_dtype": "bf16"}, "bf16", ""),
        ({"stage": 2, "overlap_comm": True}, "32", ""),
    ],
)
def test_options_that_would_be_ignored_or_fail_are_errors_of_the_plan(
    options: dict[str, Any], precision: Any, code: str
) -> None:
    plan = Trainer(strategy=use("deepspeed", **options), precision=precision).plan

    assert [problem.code for problem in plan.problems] == ([code] if code else [])


# ---- files ---------------------------------------------------------------------------------------

FILES: Mapping[str, tuple[bytes, str]] = {
    "cut off": (b'{"gradient_clipping": 1.0', "is not JSON"),
    "two lines down": (b'{\n"bf16": {},\n oops}', "line 3, column 2"),
    "empty": (b"", "is not JSON"),
    "a list": (b"[1, 2]", "holds a list: a configuration is a table of keys"),
    "a key twice": (b'{"bf16": {}, "bf16": {}}', "has the key 'bf16' twice: keep one of them"),
    "another encoding": ('{"_": "größer"}'.encode("latin-1"), "is not UTF-8 (byte 9)"),
    "nested without end": (b'{"a": ' * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_says_where(name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    path = tmp_path / "ds.json"
    path.write_bytes(content)

    with pytest.raises(ValueError, match=r"ds\.json") as raised:
        DeepSpeedOptions(config=str(path))

    assert expected in str(raised.value)


@pytest.mark.parametrize("given", ["nowhere.json", ".", "{}", "a\0b", "x" * 5000, 7, ["a"], {1: 2}])
def test_what_is_no_configuration_is_refused(given: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="config"):
        DeepSpeedOptions(config=given)


def test_a_damaged_file_is_read_or_refused_and_never_anything_else(tmp_path: Path) -> None:
    whole = json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}).encode()
    draw, path = random.Random(0), tmp_path / "ds.json"
    refused = 0

    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] = draw.choice(b' 0123,:"{}\xff\x00')
        path.write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
        try:
            DeepSpeedOptions(config=path)  # type: ignore[arg-type]  # paths are taken too
        except ValueError:
            refused += 1

    assert 200 < refused < 300  # some damage is only another space, or another stage


# ---- contradictions name both places -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "config", "expected"),
    [
        ({"stage": 1}, {"stage": 3}, "zero_optimization.stage=3, but the option stage=1"),
        (
            {"offload_optimizer": "cpu"},
            {"offload_optimizer": {"device": "nvme", "nvme_path": "/data"}},
            "offload_optimizer.device='nvme', but the option offload_optimizer='cpu'",
        ),
        (
            {"bucket_elements": 1000},
            {"reduce_bucket_size": 5e8},
            "reduce_bucket_size=500000000, but the option bucket_elements=1000",
        ),
        (
            {"persistence_threshold": 10},
            {"param_persistence_threshold": 20},
            "but the option persistence_threshold=10",
        ),
    ],
)
def test_an_option_and_the_configuration_must_agree(
    options: dict[str, Any], config: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match="keep one of them") as raised:
        DeepSpeedOptions(config={"zero_optimization": config}, **options)

    assert expected in str(raised.value)


TRAINER: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], str, str]] = {
    "clipping": (
        {"gradient_clip_val": 0.5},
        {"gradient_clipping": 1.0},
        "asks for gradient_clip_val=1.0, the Trainer has gradient_clip_val=0.5",
        "gradient_clipping=1 in config",
    ),
    "clipping off": (
        {"gradient_clip_val": 0.5},
        {"gradient_clipping": 0},
        "asks for gradient_clip_val=None, the Trainer has gradient_clip_val=0.5",
        "gradient_clipping=0 in config",
    ),
    "windows": (
        {"accumulate_grad_batches": 2},
        {"gradient_accumulation_steps": 8},
        "asks for accumulate_grad_batches=8, the Trainer has accumulate_grad_batches=2",
        "gradient_accumulation_steps=8 in config",
    ),
    "bf16 on": (
        {"precision": "bf16"},
        {"bf16": {"enabled": True}},
        "asks for precision='bf16-true', the Trainer has precision='bf16'",
        "bf16.enabled=true in config",
    ),
    "bf16 off": (
        {"precision": "bf16-true"},
        {"bf16": {"enabled": False}},
        "asks for precision='32', the Trainer has precision='bf16-true'",
        "bf16.enabled=false in config",
    ),
    "fp16 on": (
        {"precision": "bf16"},
        {"fp16": {"enabled": True}},
        "asks for precision='16', the Trainer has precision='bf16'",
        "fp16.enabled=true in config",
    ),
    "autocast off": (
        {"precision": "bf16"},
        {"torch_autocast": {"enabled": False}},
        "asks for precision='32', the Trainer has precision='bf16'",
        "torch_autocast.enabled=false in config",
    ),
}


@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_and_the_configuration_must_agree(name: str) -> None:
    flags, config, both, place = TRAINER[name]

    plan = Trainer(strategy=use("deepspeed", config=config), **flags).plan

    found = [problem for problem in plan.problems if problem.code == "TW203"]
    assert [both in problem.what for problem in found] == [True]
    assert place in found[0].why


@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_and_the_configuration_may_say_the_same(name: str) -> None:
    flags, config, *_ = TRAINER[name]
    autos = json.loads(json.dumps(config), object_hook=_auto)

    plan = Trainer(strategy=use("deepspeed", config=autos), **flags).plan

    assert not plan.has_errors


def _auto(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, dict) else "auto" for key, value in table.items()}


FACTS = RunFacts(world_size=2, batch_size=4, last_batch_size=4, steps_per_epoch=8, total_steps=8)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, "=8 in config, but batches of 4 (the data)"),
        (
            {"train_batch_size": 8},
            "but batches of 24 (4 a process times accumulate_grad_batches=3 times 2 processes)",
        ),
    ],
)
def test_batch_sizes_must_be_those_of_the_run(config: dict[str, Any], expected: str) -> None:
    settings = Settings(accumulate_grad_batches=3)

    faults = find_batch_faults(DeepSpeedOptions(config=config), settings, FACTS)

    assert [expected in fault for fault in faults] == [True]


@pytest.mark.parametrize("size", [24, "auto"])
def test_batch_sizes_that_are_those_of_the_run_are_fine(size: object) -> None:
    config = {"train_batch_size": size, "train_micro_batch_size_per_gpu": 4}
    settings = Settings(accumulate_grad_batches=3)

    assert find_batch_faults(DeepSpeedOptions(config=config), settings, FACTS) == []


def test_batch_sizes_of_data_that_nobody_knows_are_not_judged() -> None:
    facts = RunFacts(2, None, None, None, None)

    assert not find_batch_faults(
        DeepSpeedOptions(config={"train_batch_size": 3}), Settings(), facts
    )


# ---- the optimizer in two places -----------------------------------------------------------------

Factory = Callable[[Any], Any]
OPTIMIZERS: Mapping[str, tuple[Factory, Mapping[str, Any], str]] = {
    "another one": (
        partial(SGD, lr=0.1),
        {"type": "AdamW"},
        "optimizer.type='AdamW' in config, but the Trainer was given SGD",
    ),
    "another rate": (
        partial(AdamW, lr=0.1),
        {"type": "AdamW", "params": {"lr": 0.001}},
        "optimizer.params.lr=0.001 in config, but AdamW was made with lr=0.1",
    ),
    "a misspelled rate": (
        partial(AdamW, lr=0.1),
        {"type": "AdamW", "params": {"weight_decy": 0.1}},
        "is no option of AdamW; did you mean 'weight_decay'?",
    ),
    "DeepSpeed's Adam without decay as AdamW has it": (
        partial(AdamW, lr=0.1),
        {"type": "Adam", "params": {"adam_w_mode": False}},
        "the Trainer was given AdamW",
    ),
}
SAME: Mapping[str, tuple[Factory, Mapping[str, Any]]] = {
    "auto": (partial(SGD, lr=0.1), {"type": "auto", "params": {"lr": "auto"}}),
    "its own values": (
        partial(AdamW, lr=0.1),
        {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.999], "torch_adam": True}},
    ),
    "DeepSpeed's Adam decays as AdamW does": (partial(AdamW, lr=0.1), {"type": "Adam"}),
    "Adam": (partial(Adam, lr=0.1), {"type": "Adam", "params": {"lr": 0.1}}),
}


def faults_of(make: Factory, optimizer: Mapping[str, Any]) -> list[str]:
    options = DeepSpeedOptions(config={"optimizer": optimizer})
    return find_optimizer_faults(options, make(nn.Linear(2, 2).parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_optimizer_in_the_configuration_is_named(name: str) -> None:
    make, optimizer, expected = OPTIMIZERS[name]

    faults = faults_of(make, optimizer)

    assert [expected in fault for fault in faults] == [True]


@pytest.mark.parametrize("name", SAME)
def test_the_same_optimizer_in_the_configuration_is_fine(name: str) -> None:
    make, optimizer = SAME[name]

    assert faults_of(make, optimizer) == []


# ---- two processes -------------------------------------------------------------------------------


def _fit(config: Any, optimizer: Factory) -> str:
    trainer = Trainer(
        strategy=use("deepspeed", config=config),
        data=use("torch", batch_size=4),
        max_steps=2,
        barebones=True,
    )
    try:
        trainer.fit(models.mlp(), _data(), loss=F.cross_entropy, optimizer=optimizer)
    except Exception as error:  # noqa: BLE001 - what it is, is what the test is about
        return f"{type(error).__name__}: {error}"
    return "trained"


def _data() -> Any:
    inputs, targets = models.features(32)
    return list(zip(inputs, targets, strict=True))


FITS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "an unknown key": ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'?"),
    "a batch size": ({"train_batch_size": 4}, "train_batch_size=4 in config, but batches of 8"),
    "another optimizer": (
        {"optimizer": {"type": "Adam"}},
        "optimizer.type='Adam' in config, but the Trainer was given SGD",
    ),
    "nothing": ({"train_batch_size": 8, "optimizer": {"type": "SGD"}}, "trained"),
}


@pytest.mark.parametrize("name", FITS)
def test_every_process_says_it_before_the_first_step(name: str) -> None:
    config, expected = FITS[name]

    answers = run_ranks(_fit, 2, config, partial(SGD, lr=0.1), timeout_seconds=240)

    assert [expected in answer for answer in answers] == [True, True], answers


def _fit_from_own_file(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    rank = int(os.environ["RANK"])
    path = Path(f"ds{rank}.json")
    path.write_text(json.dumps([first, second][rank]), encoding="utf-8")
    return _fit(str(path), partial(SGD, lr=0.1))


def test_processes_with_different_files_are_told_the_difference() -> None:
    first = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}
    second = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.25}

    answers = run_ranks(_fit_from_own_file, 2, first, second, timeout_seconds=240)

    assert all(answer.startswith("RanksDisagree") for answer in answers)
    assert all("0.25" in answer and "0.5" in answer for answer in answers)
