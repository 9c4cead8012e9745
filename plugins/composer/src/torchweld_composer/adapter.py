"""A Composer algorithm as a surgery: its events become the pieces of ``Parts`` at their moments."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from torchweld.errors import SurgeryError
from torchweld.interfaces import Parts
from torchweld_composer.checks import note, refuse_meta, repair
from torchweld_composer.driver import Driver, Role
from torchweld_composer.events import BATCH, BORDER, GRADS, LOSS, OPTIMIZER, STEP, SURGERY, TARGETS
from torchweld_composer.imports import composer_module
from torchweld_composer.known import Known
from torchweld_composer.pieces import (
    AveragePiece,
    BatchPiece,
    BorderPiece,
    GradPiece,
    LossPiece,
    OptimizerPiece,
    StepPiece,
    TargetPiece,
)
from torchweld_composer.special import OPTIMIZER_OF, PREPARE, SAMPLE_TRANSFORM


class AlgorithmSurgery:
    """Runs one Composer algorithm, without Composer's trainer, engine or state."""

    def __init__(self, algorithm: Any, role: Role) -> None:
        self.algorithm = algorithm
        self.role = role

    def apply(self, parts: Parts) -> Parts:
        """Change the model now and add the pieces that act in the loop."""
        refuse_meta(self.role.name, parts.model)
        driver = Driver(self.algorithm, self.role, parts.model)
        prepare = PREPARE.get(self._own_class)
        if prepare is not None:
            prepare(driver, parts)
        model = _operate(driver, parts.model)
        return self._with_samples(self._with_pieces(driver, replace(parts, model=model)))

    @property
    def _own_class(self) -> str:
        """The class's name when it is Composer's own, which may need special care."""
        return "" if self.role.watched else type(self.algorithm).__name__

    @property
    def _has_memory(self) -> bool:
        """Whether something is counted, saved or watched for at borders."""
        role = self.role
        return role.timed or role.watched or _has_state(self.algorithm)

    def _with_pieces(self, driver: Driver, parts: Parts) -> Parts:
        added: dict[str, Any] = {}
        if driver.chosen(BATCH):
            added["batch_transforms"] = (*parts.batch_transforms, BatchPiece(driver))
        if driver.chosen(TARGETS):
            added["target_transforms"] = (*parts.target_transforms, TargetPiece(driver))
        if driver.chosen(LOSS):
            added["loss"] = LossPiece(driver, _visible_loss(self.role.name, parts))
        if driver.chosen(GRADS):
            added["grad_transforms"] = (*parts.grad_transforms, GradPiece(driver))
        if driver.chosen(OPTIMIZER):
            wrapper = OPTIMIZER_OF.get(self._own_class)
            piece = wrapper(self.algorithm) if wrapper else OptimizerPiece(driver)
            added["optimizer_wrappers"] = (*parts.optimizer_wrappers, piece)
        if driver.chosen(STEP):
            added["after_step"] = (*parts.after_step, StepPiece(driver))
        if driver.chosen(BORDER) or self._has_memory:
            added["callbacks"] = (*parts.callbacks, _border_piece(driver))
        return replace(parts, **added)

    def _with_samples(self, parts: Parts) -> Parts:
        make = SAMPLE_TRANSFORM.get(self._own_class)
        if make is None or self.role.events:  # ColOut has a form for batches and one for samples
            return parts
        return replace(parts, sample_transforms=(*parts.sample_transforms, make(self.algorithm)))


def known_surgery(algorithm: Any, entry: Known) -> AlgorithmSurgery:
    """The surgery of one of Composer's own algorithms."""
    role = Role(
        entry.name,
        entry.events(algorithm),
        asks=entry.asks,
        timed=entry.timed,
        unresumable=entry.unresumable,
    )
    return AlgorithmSurgery(algorithm, role)


def _operate(driver: Driver, model: nn.Module) -> nn.Module:
    """Fire the events of the surgery on the bare model; what it loses is put right."""
    before, given = note(model), driver.state.model
    with warnings.catch_warnings():
        # Core says by comparison when nothing was changed, for every algorithm and in one place.
        warnings.simplefilter(
            "ignore", composer_module("composer.algorithms.warnings").NoEffectWarning
        )
        for act in driver.actions(SURGERY):
            act()
    changed = model if driver.state.model is given else driver.state.model
    if not isinstance(changed, nn.Module):
        raise SurgeryError(f"{driver.role.name} left {type(changed).__name__} as the model")
    repair(driver.role.name, before, changed)
    return changed


def _visible_loss(name: str, parts: Parts) -> Callable[[Any, Any], Any]:
    if parts.loss is None:
        raise SurgeryError(
            f"{name} works on the loss, which is computed inside the model or the step function "
            "here; give it to fit: loss=F.cross_entropy"
        )
    return parts.loss


def _has_state(algorithm: Any) -> bool:
    base = composer_module("composer.core").Algorithm
    return type(algorithm).state_dict is not base.state_dict


def _border_piece(driver: Driver) -> BorderPiece:
    """What acts at borders; the only algorithm of Composer's that acts on evaluation averages."""
    averages = not driver.role.watched and "EVAL_START" in driver.role.events
    return AveragePiece(driver) if averages else BorderPiece(driver)
