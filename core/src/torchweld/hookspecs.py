"""Every hook that a plugin may implement, one screen each.

A plugin is a light module behind an entry point of the group ``torchweld``; its hook
implementations are plain functions marked with ``hookimpl``. Hooks are called at set-up only,
never in the step loop. All of them are optional, but a plugin implements at least one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

from torchweld.claims import Phase
from torchweld.components import Component

if TYPE_CHECKING:
    from torchweld.interfaces import RunFacts
    from torchweld.plan import Plan
    from torchweld.problems import Problem

PROJECT = "torchweld"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as the implementation of the hook of its name."""


@hookspec
def torchweld_strategies() -> Iterable[Component]:  # type: ignore[empty-body]  # a specification
    """Offer strategies: where parameters live and how gradients are exchanged.

    Called once when the installed plugins are listed, so neither torch nor the wrapped library
    may be imported here; ``Component.build`` is the string that is imported when selected. It
    builds a :class:`torchweld.interfaces.Strategy`.

    Returns:
        Components; a name may be offered by one distribution only.
    """


@hookspec
def torchweld_data_sources() -> Iterable[Component]:  # type: ignore[empty-body]  # a specification
    """Offer data sources: what turns a dataset into this rank's batches.

    Called once when the installed plugins are listed, under the rules of
    :func:`torchweld_strategies`. ``Component.build`` builds a
    :class:`torchweld.interfaces.DataSource`.

    Returns:
        Components; a name may be offered by one distribution only.
    """


@hookspec
def torchweld_surgeries() -> Iterable[Component]:  # type: ignore[empty-body]  # a specification
    """Offer surgeries: what changes the model, the loss or the step before anything is wrapped.

    Called once when the installed plugins are listed, under the rules of
    :func:`torchweld_strategies`. ``Component.build`` builds a function ``Parts -> Parts`` or an
    object with such an ``apply``.

    Returns:
        Components; a name may be offered by one distribution only.
    """


@hookspec
def torchweld_adopt(obj: object, phase: Phase) -> Component | None:
    """Turn an object of the wrapped library into a component: ``surgery=[CutMix(alpha=1.0)]``.

    Called while planning, once for every chosen object that is neither a name nor a component.
    Decide by the module names in ``type(obj).__mro__``, and import nothing for it: the object
    is there, so whoever made it has imported its library already.

    Args:
        obj: what the user chose.
        phase: the argument it was given for.

    Returns:
        A component whose ``build`` returns the adopted object, or None when it is not yours. Its
        ``options`` may be None: the object's qualified name and ``repr`` enter the digest.
    """


@hookspec
def torchweld_check_plan(  # type: ignore[empty-body]  # a specification
    plan: Plan, facts: RunFacts
) -> Iterable[Problem]:
    """Check a plan against the numbers of this run, where claims cannot say it.

    Called on every rank before the first step, for plugins with a component in ``plan.order``.

    Args:
        plan: the resolved plan.
        facts: the numbers of this run; None where nobody can know one.

    Returns:
        Problems with codes ``TW6xx``; empty when all is well.
    """


@hookspec
def torchweld_commands() -> Iterable[Any]:  # type: ignore[empty-body]  # a specification
    """Offer sub-commands of ``torchweld``, e.g. ``torchweld ffcv convert``.

    Called when the command line meets a word that is no command of core. Importing the commands
    must be as light as listing; import the wrapped library inside a command's body.

    Returns:
        ``click.Command`` objects; they appear under the entry point's own name, so the commands
        of two plugins cannot collide.
    """


@hookspec
def torchweld_doctor() -> Iterable[str]:  # type: ignore[empty-body]  # a specification
    """Say what this machine lacks for the plugin, with the command that brings it.

    Called by ``torchweld doctor``. It may look for programs and files, and must not import the
    wrapped library: what is missing may be what its import ends with.

    Returns:
        Lines to print; empty when nothing is missing.
    """
