"""The conformance suite of surgeries: what is claimed is what changes, and the rest trains."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import SGD

from torchweld import rng
from torchweld.checkpoint import encode
from torchweld.components import Chosen, Component, Settings, Use
from torchweld.interfaces import Parts
from torchweld.model.parameters import make_groups
from torchweld.model.surgery import Difference, check_claims, difference, operate, snapshot
from torchweld.nesting import map_tensors, tensors
from torchweld.plan import Plan
from torchweld.planning import make_plan
from torchweld.testing import models
from torchweld.testing.registry import empty_registry
from torchweld.testing.states import assert_same_state
from torchweld.trainer import Trainer

SEED = 11
NUM_BATCHES = 3


class SurgeryConformance:
    """Subclass it with ``component = …`` and pytest holds your surgery to the contract.

    Attributes:
        component: the surgery's.
        options: its options, where they are not the defaults.
        invalid_options: options that it must refuse, one mapping each.
        wrapped: modules that listing must not import, beside torch.
        facts: tokens that the plan may not know by itself, e.g. of another component.
        skip: name of a test to the reason why it cannot apply.
    """

    component: ClassVar[Component]
    options: ClassVar[Mapping[str, object]] = {}
    invalid_options: ClassVar[Sequence[Mapping[str, object]]] = ()
    wrapped: ClassVar[Sequence[str]] = ()
    facts: ClassVar[Mapping[str, bool]] = {}
    skip: ClassVar[Mapping[str, str]] = {}

    def make_parts(self) -> Parts:
        """Parts on which the surgery has something to do; the same in every call."""
        torch.manual_seed(SEED)
        model, optimizer = models.batchnorm_convnet(), partial(SGD, lr=0.1)
        return Parts(model=model, loss=F.cross_entropy, optimizer=optimizer)

    def make_batch(self, seed: int) -> Any:
        """A batch ``(inputs, targets)`` for the model of the parts."""
        return models.images(8, seed=seed)

    @pytest.fixture(autouse=True)
    def skip_what_cannot_apply(self, request: pytest.FixtureRequest) -> None:
        """Skip the tests that ``skip`` names."""
        if request.function.__name__ in self.skip:
            pytest.skip(self.skip[request.function.__name__])

    # ---- before anything is built --------------------------------------------------------------

    def test_listing_imports_no_heavy_library(self) -> None:
        build = self.component.build
        if not isinstance(build, str):
            pytest.skip("the component is not offered by a package: its build is no string")
        package = build.partition(":")[0].partition(".")[0]
        heavy = ["torch", *self.wrapped]
        code = f"import sys, {package}; print(*[m for m in {heavy!r} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert done.returncode == 0, f"importing {package} fails: {done.stderr.decode()}"
        found = done.stdout.decode().split()
        assert not found, (
            f"importing {package} imports {', '.join(found)}: listing must stay light, so import "
            "them in the module that `build` names"
        )

    def test_its_claims_can_be_planned(self) -> None:
        errors = [f"{p.code} {p.what}. {p.why}" for p in self.plan().problems if p.code != "TW402"]
        assert not errors, f"the component cannot be planned: {errors}"

    def test_the_plan_shows_it(self) -> None:
        shown = self.plan().explain()
        assert self.component.name in shown, f"explain() does not name it:\n{shown}"

    def test_unknown_and_invalid_options_are_refused(self) -> None:
        for options in ({"no_such_option": 1}, *self.invalid_options):
            codes = {p.code for p in self.plan(options).problems}
            assert "TW103" in codes, (
                f"{options} must be refused while planning (TW103); check ranges in __post_init__ "
                "of the options"
            )

    # ---- what it changes -----------------------------------------------------------------------

    def test_it_changes_something(self) -> None:
        _, found = self.operated()
        assert found, (
            f"{self.component.name} changed nothing: let make_parts() return parts on which it has "
            "something to do"
        )

    def test_it_changes_only_what_it_claims(self) -> None:
        _, found = self.operated()
        problems = check_claims(self.component.name, found, self.chosen().claims(Settings()))
        excess = [f"{p.what}; {p.fix}" for p in problems if p.code == "TW502"]
        assert not excess, excess[0]

    def test_it_does_the_same_twice(self) -> None:
        first, second = self.operated(), self.operated()
        assert str(first[1]) == str(second[1]), (
            f"the same parts and seed gave once {first[1]} and once {second[1]}"
        )
        what = "the same parts and seed must give the same weights"
        assert_same_state(
            second[0].model.state_dict(), first[0].model.state_dict(), what=f"{what} twice"
        )

    def test_every_trainable_parameter_is_in_one_group(self) -> None:
        parts, _ = self.operated()
        assert parts.optimizer is not None, "the optimizer factory was removed from the parts"
        optimizer = parts.optimizer(make_groups(parts.model, parts.param_groups))
        held = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
        named = [(n, p) for n, p in parts.model.named_parameters() if p.requires_grad]
        wrong = {n: held[id(p)] for n, p in named if held[id(p)] != 1}
        assert not wrong, f"trainable parameters in no group or in two (name: how many): {wrong}"

    # ---- what it adds --------------------------------------------------------------------------

    def test_what_it_adds_can_be_saved(self) -> None:
        for part in _stateful(self.make_parts(), self.operated()[0]):
            encode(part.state_dict(), f"the state of {type(part).__name__}")

    def test_a_model_trains_with_it(self, tmp_path: Path) -> None:
        before = self.operated()[0].model.state_dict()
        after = self.train(tmp_path, max_steps=NUM_BATCHES)

        unsound = [n for n, t in after.items() if not torch.isfinite(t).all()]
        assert not unsound, f"after {NUM_BATCHES} steps these are not finite: {unsound}"
        moved = [n for n, t in after.items() if not torch.equal(t, before[n])]
        assert moved, f"after {NUM_BATCHES} steps no parameter has moved"

    def test_training_repeats_with_its_seed(self, tmp_path: Path) -> None:
        first, second = (self.train(tmp_path / name, max_steps=NUM_BATCHES) for name in "ab")

        what = "two runs with one seed must give the same weights (does it draw from python, numpy "
        assert_same_state(second, first, what=what + "or torch, and from nothing else?)")

    def test_a_resumed_run_goes_on_as_if_never_stopped(self, tmp_path: Path) -> None:
        undisturbed = self.train(tmp_path / "whole", max_steps=2 * NUM_BATCHES)

        self.train(tmp_path / "parts", max_steps=NUM_BATCHES + 1)
        resumed = self.train(tmp_path / "parts", max_steps=2 * NUM_BATCHES, ckpt_path="last")

        what = "a resumed run differs from one that never stopped (is state missing in state_dict?)"
        assert_same_state(resumed, undisturbed, what=what)

    def test_the_users_batches_stay_as_they_are(self, tmp_path: Path) -> None:
        batches = Batches([self.make_batch(seed) for seed in range(NUM_BATCHES)])
        copies = map_tensors(batches.batches, Tensor.clone)

        self.train(tmp_path, batches, max_steps=NUM_BATCHES)

        pairs = zip(tensors(batches.batches), tensors(copies), strict=True)
        assert all(torch.equal(now, before) for now, before in pairs), (
            "a batch that the user may keep was changed in place: return a new one"
        )

    # ---- what the tests are written with -------------------------------------------------------

    def plan(self, options: Mapping[str, object] | None = None) -> Plan:
        """A plan with this surgery alone, in which its facts hold."""
        return make_plan(
            empty_registry(),
            strategy="single",
            data="torch",
            surgery=[Use(self.component, self.options if options is None else options)],
            facts={
                "world>1": False,
                "loss.visible": True,
                "loss.accepts_soft_targets": True,
                "loss.smooths": False,
                "model.conv": True,
                "model.batchnorm": True,
                "inputs.4d": True,
                "targets.ignored": False,
                **self.facts,
            },
        )

    def chosen(self) -> Chosen:
        """The component with its options, as the plan adapts it."""
        (chosen,) = self.plan().surgeries
        return chosen

    def operated(self) -> tuple[Parts, Difference]:
        """Fresh parts after the surgery, and what core found changed."""
        parts = self.make_parts()
        before, chosen = snapshot(parts), self.chosen()
        rng.seed_all(SEED)
        after = operate(chosen, chosen.make(), parts)
        return after, difference(before, snapshot(after))

    def train(
        self, directory: Path, data: Any = None, *, max_steps: int, ckpt_path: str | None = None
    ) -> dict[str, Tensor]:
        """Train fresh parts by the Trainer, and return the weights that it exports."""
        trainer = Trainer(
            strategy="single",
            surgery=[Use(self.component, self.options)],
            accelerator="cpu",
            max_steps=max_steps,
            seed=SEED,
            default_root_dir=directory,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            registry=empty_registry(),
        )
        parts = self.make_parts()
        trainer.fit(
            parts.model,
            data or Batches([self.make_batch(seed) for seed in range(NUM_BATCHES)]),
            loss=parts.loss,
            optimizer=parts.optimizer,
            param_groups=parts.param_groups,
            ckpt_path=ckpt_path,
        )
        trainer.export(directory / "weights.safetensors")
        return load_file(directory / "weights.safetensors")


class Batches:
    """An iterable of batches that it hands out as they are."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _stateful(before: Parts, after: Parts) -> list[Any]:
    """What was added to the parts and has a state."""
    added = []
    for name in (f.name for f in fields(Parts)):
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(new, tuple):
            owners = [getattr(item, "__self__", item) for item in new if item not in old]
            added += [owner for owner in owners if hasattr(owner, "state_dict")]
    return added
