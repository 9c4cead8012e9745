"""From choices to a plan: one pure function, without torch, that finds all problems at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torchweld.components import Chosen, Settings
from torchweld.plan import Plan, Settled, make_digest
from torchweld.problems import Problem
from torchweld.resolving.adaptation import Adapted, adapt
from torchweld.resolving.conflicts import Deferred, find_conflicts, find_deferred
from torchweld.resolving.declared import unknown_words
from torchweld.resolving.findings import in_order, merge, settle_later, settle_severities
from torchweld.resolving.known import Known, check_facts
from torchweld.resolving.ordering import Ordered, order
from torchweld.resolving.suggestions import with_fixes


def resolve(
    chosen: Sequence[Chosen],
    settings: Settings,
    *,
    facts: Mapping[str, bool] | None = None,
    problems: Sequence[Problem] = (),
    allow: Sequence[str] = (),
    strict: bool = False,
    offered: Sequence[Chosen] = (),
) -> Plan:
    """Check, adapt and order what was chosen.

    The result does not depend on the order of ``chosen`` nor of ``offered``.

    Args:
        chosen: the components with their options.
        settings: the user's; components may ask for others.
        facts: run and fit tokens as far as they are known; a missing one is decided later.
        problems: findings from choosing, which become part of the plan.
        allow: keys of findings that the user accepts, e.g. ``"TW302:cutmix+mixup"``.
        strict: warnings become errors.
        offered: installed components with default options, from which fixes are proposed.

    Raises:
        InvalidArgument: a key of ``facts`` is no token.
    """
    facts = dict(facts or {})
    check_facts(facts)
    found = _find(chosen, settings, facts)
    judge = partial(_error_keys, settings, facts, problems)
    explained = with_fixes([*problems, *found.problems], chosen, offered, judge)
    order_of_run = tuple(member.chosen for member in found.ordered.members)
    return Plan(
        order=order_of_run,
        edges=found.ordered.edges,
        adjusted=found.adapted.adjusted,
        settled=_settled(found.ordered),
        deferred=found.deferred,
        settings=found.adapted.settings,
        problems=settle_severities(
            explained, allow=allow, strict=strict, open_keys=_open_keys(found.deferred)
        ),
        digest=make_digest(order_of_run, found.adapted.settings),
        facts=facts,
        owned=_owned(found.ordered),
        choices=tuple(chosen),
        again=partial(
            resolve,
            tuple(chosen),
            settings,
            problems=tuple(problems),
            allow=tuple(allow),
            strict=strict,
            offered=tuple(offered),
        ),
        settle=partial(settle_later, allow=tuple(allow), strict=strict),
    )


class _Found(NamedTuple):
    """What one pass finds."""

    adapted: Adapted
    ordered: Ordered
    problems: list[Problem]
    deferred: tuple[Deferred, ...]


def _find(chosen: Sequence[Chosen], settings: Settings, facts: Mapping[str, bool]) -> _Found:
    adapted = adapt(chosen, settings, facts)
    members = adapted.members
    known = Known(members, adapted.settings, facts)
    ordered = order(members)
    names = {member.name for member in members}
    findings = [
        *adapted.findings,
        *(finding for member in members for finding in unknown_words(member, names)),
        *find_conflicts(members, known),
        *ordered.findings,
    ]
    return _Found(adapted, ordered, list(in_order(merge(findings))), find_deferred(members, known))


def _error_keys(
    settings: Settings,
    facts: Mapping[str, bool],
    given: Sequence[Problem],
    chosen: Sequence[Chosen],
) -> frozenset[str]:
    """The errors that other choices would have, beside those that were given."""
    problems = (*given, *_find(chosen, settings, facts).problems)
    return frozenset(problem.key for problem in problems if problem.severity == "error")


def _settled(ordered: Ordered) -> tuple[Settled, ...]:
    settled = [Settled(*pair) for member in ordered.members for pair in member.settles]
    return tuple(dict.fromkeys(settled))


def _owned(ordered: Ordered) -> Mapping[str, tuple[str, ...]]:
    owned: dict[str, tuple[str, ...]] = {}
    for member in ordered.members:
        for rel in member.owns:
            owned[rel.target] = (*owned.get(rel.target, ()), member.name)
    return owned


def _open_keys(deferred: Sequence[Deferred]) -> set[str]:
    """Keys of the findings that the deferred relations may still become."""
    return {f"{code}:{entry.component}" for entry in deferred for code in ("TW301", "TW302")}
