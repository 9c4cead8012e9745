"""The surgery suite passes honest surgeries and fails each wrong one for its own reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from torchweld.claims import Claims
from torchweld.components import Component
from torchweld.interfaces import Parts
from torchweld.testing import SurgeryConformance


@dataclass(frozen=True)
class Options:
    slope: float = 0.1  # of the negative side, in [0, 1)

    def __post_init__(self) -> None:
        if not 0 <= self.slope < 1:
            raise ValueError(f"slope={self.slope} is not in [0, 1)")


@dataclass(frozen=True)
class UncheckedOptions:
    slope: float = 0.1


def leak(parts: Parts, slope: float = 0.1) -> Parts:
    """Replace every ReLU."""
    for name, module in list(parts.model.named_children()):
        if isinstance(module, nn.ReLU):
            setattr(parts.model, name, nn.LeakyReLU(slope))
    return parts


def leaking(slope: float) -> Callable[[Parts], Parts]:
    return partial(leak, slope=slope)


def component(build: Callable[..., Any], **claims: Any) -> Component:
    return Component("by_hand", "for these tests", build, claims=Claims(**claims))


class Noise:
    """Adds noise that shrinks with every batch, and counts the batches."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.count += 1
        return batch[0] + torch.randn_like(batch[0]) / self.count, batch[1]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


def with_batch_transform(make: Callable[[], Any]) -> Component:
    def build() -> Callable[[Parts], Parts]:
        return lambda parts: replace(parts, batch_transforms=(*parts.batch_transforms, make()))

    return component(build, edits="batch.inputs")


class TestLeakingReLU(SurgeryConformance):
    component = Component("leak", "leaking ReLUs", leaking, options=Options)
    invalid_options: ClassVar = ({"slope": 1.0}, {"slope": -0.5})


class TestNoise(SurgeryConformance):
    component = with_batch_transform(Noise)


class ForgettingNoise(Noise):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class UnsavableNoise(Noise):
    def state_dict(self) -> dict[str, Any]:
        return {"noise": self}


class NoiseInPlace(Noise):
    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        batch[0].add_(1.0)
        return batch


class UnseededNoise(Noise):
    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator()
        generator.seed()
        return batch[0] + torch.randn(batch[0].shape, generator=generator), batch[1]


def do_nothing(parts: Parts) -> Parts:
    return parts


def replace_loss(parts: Parts) -> Parts:
    return replace(leak(parts), loss=nn.functional.multi_margin_loss)


def grow_at_random(parts: Parts) -> Parts:
    generator = torch.Generator()
    generator.seed()
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return parts


def keep_the_old_optimizer(parts: Parts) -> Parts:
    factory, old = parts.optimizer, list(parts.model.parameters())
    assert factory is not None
    parts.model[3] = nn.Conv2d(16, 16, 3, stride=2, padding=1)  # type: ignore[operator]
    return replace(parts, optimizer=lambda _: factory([{"params": old}]))


def explode(parts: Parts) -> Parts:
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.mul_(1e30)
    return parts


WRONG = [
    (component(lambda: do_nothing), "test_it_changes_something", "changed nothing"),
    (component(lambda: replace_loss), "test_it_changes_only_what_it_claims", "'loss'.*loss.fn"),
    (component(lambda: grow_at_random), "test_it_does_the_same_twice", "the same weights twice"),
    (
        component(lambda: keep_the_old_optimizer, edits=("model.modules", "optimizer")),
        "test_every_trainable_parameter_is_in_one_group",
        r"'3.weight': 0",
    ),
    (component(lambda: leak, edits="model.module"), "test_its_claims_can_be_planned", "TW102"),
    (
        Component("by_hand", "", leaking, options=UncheckedOptions),
        "test_unknown_and_invalid_options_are_refused",
        "'slope': 1.0",
    ),
]


@pytest.mark.parametrize(("wrong", "test", "message"), WRONG, ids=[case[1] for case in WRONG])
def test_the_suite_finds(wrong: Component, test: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        getattr(suite_for(wrong), test)()


TRAINED_WRONG = [
    (component(lambda: explode), "test_a_model_trains_with_it", "not finite"),
    (
        with_batch_transform(UnseededNoise),
        "test_training_repeats_with_its_seed",
        "two runs with one seed",
    ),
    (
        with_batch_transform(ForgettingNoise),
        "test_a_resumed_run_goes_on_as_if_never_stopped",
        "state missing in state_dict",
    ),
    (
        with_batch_transform(NoiseInPlace),
        "test_the_users_batches_stay_as_they_are",
        "changed in place",
    ),
]


@pytest.mark.parametrize(
    ("wrong", "test", "message"), TRAINED_WRONG, ids=[case[1] for case in TRAINED_WRONG]
)
def test_the_suite_finds_in_training(
    wrong: Component, test: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=message):
        getattr(suite_for(wrong), test)(tmp_path)


def test_the_suite_finds_state_that_cannot_be_saved() -> None:
    with pytest.raises(Exception, match="UnsavableNoise"):
        suite_for(with_batch_transform(UnsavableNoise)).test_what_it_adds_can_be_saved()


def test_the_suite_finds_a_package_that_imports_torch_to_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy_plugin.py").write_text("import torch\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    heavy = Component("heavy", "", "heavy_plugin:build")

    with pytest.raises(AssertionError, match="importing heavy_plugin imports torch"):
        suite_for(heavy).test_listing_imports_no_heavy_library()


def suite_for(wrong: Component) -> SurgeryConformance:
    class Suite(SurgeryConformance):
        component = wrong
        invalid_options = ({"slope": 1.0},)

    return Suite()
