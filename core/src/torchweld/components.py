"""What an entry point offers and what a user chooses: plain data, no torch.

A :class:`Component` is what a plugin registers, a :class:`Use` what a user writes, a
:class:`Chosen` both together, ready to be resolved.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Union, cast

from torchweld.claims import Claims, Phase

API = 1
"""The number a component states as ``api``; raised when the contracts change incompatibly."""

Precision = Literal["32", "bf16", "bf16-true", "16"]


@dataclass(frozen=True)
class CompileOptions:
    """Options of ``torch.compile``, with its defaults, for each unit of the model."""

    backend: str | Callable[..., Any] = "inductor"  # a name of torch.compiler.list_backends()
    mode: str | None = None  # of inductor: "reduce-overhead", "max-autotune", …
    dynamic: bool | None = None  # None: another size is compiled once more, for every size
    fullgraph: bool = False  # a graph break is an error
    options: Mapping[str, Any] | None = None  # of the backend
    units: str | tuple[str, ...] = ()  # classes or modules instead of the strategy's units


@dataclass(frozen=True)
class CheckpointingOptions:
    """Options of ``torch.utils.checkpoint``, with its defaults, for each unit of the model."""

    units: str | tuple[str, ...] = ()  # classes or modules instead of the strategy's units
    every: int = 1  # only every so many units, the first ones left out
    preserve_rng_state: bool = True  # the recomputation draws the same random numbers
    determinism_check: Literal["default", "none"] = "default"  # of recomputed shapes and dtypes
    context_fn: Callable[[], Any] | None = None  # selective: what is kept in the region after all

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: give 1 for all units, 2 for every other one, …")


@dataclass(frozen=True)
class Settings:
    """Concerns that core settles; a strategy writes every one explicitly, also "off".

    ``bf16`` and ``16`` are autocast over fp32 parameters, ``bf16-true`` casts the parameters.
    """

    precision: Precision = "32"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    compile: CompileOptions | None = None
    activation_checkpointing: CheckpointingOptions | None = None
    deterministic: bool | Literal["warn"] = False
    sync_batchnorm: bool = False
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int | None = None


@dataclass(frozen=True)
class Component:
    """One thing that can be chosen; the phase is the hook (or the argument) it came by.

    Attributes:
        name: what the user writes.
        summary: one line for ``torchweld plugins``.
        build: ``"module:object"``, imported only when selected, or the callable itself; it is
            called with the options as keywords and returns the strategy, source or surgery.
        options: a frozen dataclass, every field with a default where one makes sense.
        claims: or a function of (options, settings) that returns them.
        needs: PEP 508 requirements, checked before ``build`` is imported.
        presets: familiar name to options, e.g. ``{"deepspeed_stage_3": {"stage": 3}}``.
        api: the contract number this component was written for.
    """

    name: str
    summary: str
    build: str | Callable[..., Any]
    options: type | None = None
    claims: Claims | Callable[[Any, Settings], Claims] = field(default_factory=Claims)
    needs: Sequence[str] = ()
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    api: int = API


@dataclass(frozen=True)
class Use:
    """A choice with options; ``after`` adds an edge of the user's own."""

    name: str | object
    options: Mapping[str, object] = field(default_factory=dict)
    after: tuple[str, ...] = ()


Choice = Union[str, Use, Component, object]
"""A name, a ``Use``, a ``Component``, an adoptable object or (surgery) a function of ``Parts``."""


def use(choice: str | object, *, after: str | Sequence[str] = (), **options: object) -> Use:
    """Choose ``choice`` with options: ``use("cutmix", alpha=0.5)``.

    Args:
        choice: a component's name, or an object or function so that ``after`` reaches it.
        after: names of surgeries that must come first.
        options: the component's own options; a wrong one is a problem of the plan.
    """
    return Use(choice, options, (after,) if isinstance(after, str) else tuple(after))


@dataclass(frozen=True)
class Origin:
    """Where a component comes from; empty strings for what a user passed in directly."""

    distribution: str = ""
    version: str = ""
    location: str = ""


@dataclass(frozen=True)
class Chosen:
    """A component with its options, before or after resolution.

    Attributes:
        phase: of the hook or the argument that it came by.
        component: what was chosen.
        options: an instance of ``component.options``, or None where there is none.
        origin: distribution and version, for messages and the digest.
        after: names that the user wants before it.
        position: place in the user's list for bare functions, which keep their order.
        split: ``"val"`` for the data source of the other splits, else ``""``.
    """

    phase: Phase
    component: Component
    options: Any = None
    origin: Origin = Origin()
    after: tuple[str, ...] = ()
    position: int | None = None
    split: Literal["", "val"] = ""

    @property
    def name(self) -> str:
        """The component's name."""
        return self.component.name

    def claims(self, settings: Settings) -> Claims:
        """The claims of this component with these options under these settings."""
        claims = self.component.claims
        return claims if isinstance(claims, Claims) else claims(self.options, settings)

    def load(self) -> Callable[..., Any]:
        """Import what ``build`` names.

        Raises:
            Exception: whatever the plugin's module raises; the caller adds its name.
        """
        build = self.component.build
        if not isinstance(build, str):
            return build
        module, _, attribute = build.partition(":")
        return cast("Callable[..., Any]", getattr(importlib.import_module(module), attribute))

    def make(self) -> Any:
        """Build the strategy, data source or surgery with the options as keywords."""
        options = self.options
        keywords = {f.name: getattr(options, f.name) for f in fields(options)} if options else {}
        return self.load()(**keywords)
