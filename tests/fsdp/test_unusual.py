"""Models and habits that FSDP2 alone gets wrong without a word, or answers with a riddle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import TensorDataset

from tests.fsdp.gpt import Gpt, text
from torchweld import Trainer, use
from torchweld.errors import TorchweldError
from torchweld.testing import models, run_ranks

MOMENTUM = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1)


def trainer_of(strategy: str, options: Mapping[str, Any], **settings: Any) -> Trainer:
    defaults = {"data": use("torch", batch_size=2), "max_epochs": 1, "seed": 3, "barebones": True}
    return Trainer(strategy=use(strategy, **options), **{**defaults, **settings})


def trained(
    strategy: str,
    make_model: Callable[[], nn.Module],
    options: Mapping[str, Any] | None = None,
    optimizer: Any = MOMENTUM,
    **settings: Any,
) -> dict[str, Tensor]:
    """Train for an epoch; the whole weights."""
    torch.manual_seed(1)
    trainer = trainer_of(strategy, options or {}, **settings)
    data = TensorDataset(*(text(16) if make_model is Gpt else models.features(16)))
    trainer.fit(make_model(), data, loss=F.cross_entropy, optimizer=optimizer)
    trainer.export("weights.safetensors")
    return load_file("weights.safetensors")


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert [name for name in expected if not found[name].equal(expected[name])] == []


# ---- a backward that FSDP2 does not see ----------------------------------------------------------


class Outputs:
    """An object that no tree of torch knows."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Wrapping(nn.Module):
    """Returns its logits in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(33, 7)

    def forward(self, inputs: Tensor) -> Outputs:
        return Outputs(self.layer(inputs))


def unseen() -> str:
    trainer = trainer_of("fsdp", {})
    data = TensorDataset(*models.features(16))
    with pytest.raises(TorchweldError) as caught:
        trainer.fit(
            Wrapping(),
            data,
            loss=lambda outputs, targets: F.cross_entropy(outputs.logits, targets),
            optimizer=MOMENTUM,
        )
    return str(caught.value)


def test_a_backward_that_reaches_no_parameter_is_an_error() -> None:
    for message in run_ranks(unseen, 2, timeout_seconds=180):
        assert "backward reached no parameter" in message
        assert "return tensors, tuples or mappings" in message


# ---- parameters that are kept whole --------------------------------------------------------------


class Extras(nn.Module):
    """A layer, and parameters that a step may leave out or that is frozen on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(33, 7)
        self.scale, self.unused = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7))
        self.steps = 0

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layer(inputs) * self.scale
        return logits


class Switch:
    """Changes after step 2 whether ``scale`` is trained."""

    def next_due(self, progress: Any) -> int | None:
        return 2 if progress.step < 2 else None

    def at(self, border: Any, run: Any) -> None:
        if border.progress.step == 2:
            scale = dict(run.model.named_parameters())["scale"]
            scale.requires_grad_(not scale.requires_grad)


def switching(options: Mapping[str, Any], frozen_first: bool) -> dict[str, Tensor]:
    def make_model() -> nn.Module:
        model = Extras()
        model.scale.requires_grad_(not frozen_first)
        return model

    quiet = {"barebones": False, "logger": False, "enable_checkpointing": False}
    return trained("fsdp", make_model, options, callbacks=[Switch()], **quiet)


@pytest.mark.parametrize("frozen_first", [False, True], ids=["freezing", "unfreezing"])
def test_ignored_parameters_follow_what_is_frozen_and_what_is_used(frozen_first: bool) -> None:
    cut, _ = run_ranks(switching, 2, {}, frozen_first, timeout_seconds=180)

    kept = run_ranks(switching, 2, {"ignored": ("scale", "unused")}, frozen_first)

    for weights in kept[:1]:
        for name, expected in cut.items():
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-6)
    assert cut["unused"].equal(torch.ones(7))


def two_dtypes() -> dict[str, Tensor]:
    def make_model() -> nn.Module:
        model = Extras()
        model.unused = nn.Parameter(torch.ones(7, dtype=torch.float16))
        return model

    return trained("fsdp", make_model, {"ignored": ("unused",)})


def test_an_ignored_parameter_of_another_dtype_changes_nothing_for_the_others() -> None:
    expected, _ = run_ranks(trained, 2, "ddp", Extras, {"find_unused_parameters": True})

    found, _ = run_ranks(two_dtypes, 2, timeout_seconds=180)

    assert found["layer.weight"].equal(expected["layer.weight"])


def test_a_tied_weight_is_ignored_under_any_of_its_names() -> None:
    expected, _ = run_ranks(trained, 2, "ddp", Gpt)

    found, _ = run_ranks(trained, 2, "fsdp", Gpt, {"ignored": "head.weight"})

    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


# ---- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [("Block", "Linear"), ("h.0", "h.0.qkv", "h.1")], ids=str)
def test_units_may_lie_within_units(wrap: tuple[str, ...]) -> None:
    expected, _ = run_ranks(trained, 2, "ddp", Gpt)

    found, _ = run_ranks(trained, 2, "fsdp", Gpt, {"wrap": wrap})

    assert_equal(found, expected)


class Compiled(nn.Module):
    """A block that was compiled by hand, which puts a prefix before its names."""

    def __init__(self) -> None:
        super().__init__()
        self.block: Any = torch.compile(nn.Linear(33, 33), backend="eager")
        self.head = nn.Linear(33, 7)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.block(inputs)))
        return logits


def test_a_block_that_the_user_compiled_keeps_its_names() -> None:
    expected, _ = run_ranks(trained, 2, "ddp", Compiled, timeout_seconds=180)

    found, _ = run_ranks(trained, 2, "fsdp", Compiled, timeout_seconds=180)

    assert "block.weight" in found
    assert_equal(found, expected)


# ---- one model in several runs -------------------------------------------------------------------


def used_again(strategy: str) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(1)
    model, data = models.mlp(), TensorDataset(*models.features(16))
    arguments: dict[str, Any] = {"loss": F.cross_entropy}
    before = trainer_of(strategy, {}).evaluate(model, data, **arguments)["loss"]
    for _ in range(2):
        trainer = trainer_of(strategy, {})
        trainer.fit(model, data, optimizer=MOMENTUM, **arguments)
    trainer.export("weights.safetensors")
    return before, load_file("weights.safetensors")


def test_a_model_may_be_evaluated_and_trained_twice() -> None:
    (loss, expected), _ = run_ranks(used_again, 2, "ddp", timeout_seconds=180)

    (found_loss, found), _ = run_ranks(used_again, 2, "fsdp", timeout_seconds=180)

    assert found_loss == pytest.approx(loss, abs=1e-6)
    assert_equal(found, expected)


# ---- what cannot be sharded ----------------------------------------------------------------------


def with_hook() -> nn.Module:
    model: Any = models.mlp()
    model[0].weight.register_hook(lambda gradient: gradient * 0.5)
    made: nn.Module = model
    return made


def embedding(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Embedding(97, 33, **options), nn.Linear(33, 7))


ADAFACTOR = getattr(torch.optim, "Adafactor", None)
MUON = getattr(torch.optim, "Muon", None)
REFUSED: Mapping[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "hooks": (with_hook, MOMENTUM, {}, "'0.weight' has hooks, and sharding replaces"),
    "max_norm": (partial(embedding, max_norm=1.0), MOMENTUM, {}, "'0' with max_norm=1.0 rescales"),
    "sparse": (partial(embedding, sparse=True), MOMENTUM, {}, "'0' has sparse gradients"),
    "groups of one": (models.mlp, MOMENTUM, {"reshard_after_forward": 1}, "a divisor above 1"),
    "Adafactor": (models.mlp, ADAFACTOR, {}, "Adafactor keeps rows and columns"),
    "Muon": (partial(nn.Linear, 33, 7, bias=False), MUON, {}, "Muon multiplies whole matrices"),
}


def refusal(make_model: Callable[[], nn.Module], optimizer: Any, options: Any) -> str:
    data = TensorDataset(*models.features(8))
    with pytest.raises(TorchweldError) as caught:
        trainer_of("fsdp", options).fit(
            make_model(), data, loss=F.cross_entropy, optimizer=optimizer
        )
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_wrongly_is_refused_before_step_1(name: str) -> None:
    make_model, optimizer, options, message = REFUSED[name]
    if optimizer is None:
        pytest.skip(f"this torch has no {name}")

    for told in run_ranks(refusal, 2, make_model, optimizer, options, timeout_seconds=180):
        assert message in told


def read_values() -> str:
    def rule(name: str, module: nn.Module, parameter: nn.Parameter) -> Mapping[str, object]:
        return {"weight_decay": parameter.norm().item()}

    data = TensorDataset(*models.features(8))
    with pytest.raises(TorchweldError) as caught:
        trainer_of("fsdp", {}).fit(
            models.mlp, data, loss=F.cross_entropy, optimizer=MOMENTUM, param_groups=rule
        )
    return str(caught.value)


def test_a_rule_that_reads_values_that_come_later_is_told_so() -> None:
    for message in run_ranks(read_values, 2, timeout_seconds=180):
        assert "param_groups reads the values of '0.weight'" in message
        assert "instead of a function" in message


class Lamb(AdamW):
    """Scales each update by the norm of its weight: more than one element at a time."""

    def step(self, closure: Any = None) -> Any:
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        loss = super().step(closure)
        after = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for old, new in zip(before, after, strict=True):
                update = new - old
                ratio = old.norm() / (update.norm() + 1e-6)
                new.copy_(old + update * ratio.clamp(max=1.0))
        return loss


def lamb(groups: Any) -> Optimizer:
    return Lamb(groups, lr=0.01)


def test_an_optimizer_that_looks_at_whole_weights_sees_them() -> None:
    expected, _ = run_ranks(trained, 2, "ddp", models.mlp, {}, lamb)

    found, _ = run_ranks(trained, 2, "fsdp", models.mlp, {}, lamb)

    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
