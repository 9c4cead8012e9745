"""Options and settings that follow from the other choices, brought to a fixed point.

An ``Adapt`` of a component changes its own options, ``sets`` changes a setting of core. Both may
change the claims, so they are read again after each change. Every adaptation fires at most once
and every setting is set at most once, in name order: the result is the same for any listing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from torchweld.claims import Adapt
from torchweld.components import Chosen, Settings
from torchweld.guard import attempt, one_line
from torchweld.identity import identity
from torchweld.resolving.declared import (
    Declared,
    changed_options,
    declare,
    sort_key,
    value_text,
    with_options,
)
from torchweld.resolving.findings import Finding
from torchweld.resolving.known import Known
from torchweld.vocabulary import SETTINGS, find_token

_DEFAULTS = Settings()


class Adjustment(NamedTuple):
    """What was changed for a component, and why."""

    component: str
    text: str


@dataclass(frozen=True)
class Adapted:
    """The members after adaptation, sorted by phase and name."""

    members: tuple[Declared, ...]
    settings: Settings
    adjusted: tuple[Adjustment, ...]
    findings: tuple[Finding, ...]


def adapt(chosen: Sequence[Chosen], settings: Settings, facts: Mapping[str, bool]) -> Adapted:
    """Apply what components adapt and ask for, until nothing changes any more."""
    work = _Adaptation(chosen, settings, facts)
    while work.apply_a_setting() or work.fire_an_adapt():
        pass
    return Adapted(
        tuple(work.members),
        work.settings,
        tuple(work.adjusted),
        (*work.findings(), *_setting_conflicts(work.members, settings)),
    )


class _Adaptation:
    """The state on the way to the fixed point."""

    def __init__(
        self, chosen: Sequence[Chosen], settings: Settings, facts: Mapping[str, bool]
    ) -> None:
        self._asked = settings
        self.settings = settings
        self.adjusted: list[Adjustment] = []
        self._refused: list[Finding] = []
        self._facts = facts
        self._fired: set[tuple[int, str, str, tuple[str, ...]]] = set()
        self._set: set[str] = set()
        self._read(sorted(chosen, key=sort_key))

    def apply_a_setting(self) -> bool:
        """Give core one setting that a member asks for; False when there is none left."""
        for member in self.members:
            for setting, value, reason in member.sets:
                if self._may_set(setting, value):
                    self._set.add(setting)
                    self.settings = replace(self.settings, **{setting: value})  # type: ignore[arg-type]  # a plugin's value
                    text = f"sets {setting}={value_text(value)} in core: {reason}"
                    self.adjusted.append(Adjustment(member.name, text))
                    self._read([m.chosen for m in self.members])
                    return True
        return False

    def fire_an_adapt(self) -> bool:
        """Change the options of one member whose condition holds; False when there is none."""
        known = Known(self.members, self.settings, self._facts)
        by_name = sorted(enumerate(self.members), key=lambda item: (item[1].name, item[0]))
        for index, member in by_name:
            for rule in member.adapts:
                mark = (index, rule.when, rule.unless, tuple(sorted(rule.options)))
                if mark not in self._fired and _condition(rule, member, known) is True:
                    self._fired.add(mark)
                    if self._change(index, rule, known):
                        return True
        return False

    def findings(self) -> list[Finding]:
        """What is wrong with the claims of the members themselves."""
        return [*chain.from_iterable(self._unreadable), *self._refused]

    def _may_set(self, setting: str, value: object) -> bool:
        if setting not in SETTINGS or setting in self._set:
            return False
        now = getattr(self._asked, setting)
        return bool(now != value and now == getattr(_DEFAULTS, setting))

    def _change(self, index: int, rule: Adapt, known: Known) -> bool:
        member = self.members[index]
        tried = attempt(lambda: with_options(member.chosen, rule.options))
        changed = tried.value
        if changed is None:
            self._refused.append(_bad_adapt(member, rule, tried.error))
        if changed is None or identity(changed.options) == identity(member.chosen.options):
            return False
        self.adjusted.append(Adjustment(member.name, _adjusted_text(member, rule, known)))
        self.members[index], self._unreadable[index] = declare(changed, self.settings)
        return True

    def _read(self, chosen: Sequence[Chosen]) -> None:
        read = [declare(one, self.settings) for one in chosen]
        self.members = [member for member, _ in read]
        self._unreadable = [findings for _, findings in read]


def pending(members: Sequence[Declared], known: Known) -> list[tuple[Declared, str, str]]:
    """The adaptations that cannot be decided yet: member, ``when X`` or ``unless X``, reason."""
    return [
        (member, _relation(rule), rule.reason)
        for member in members
        for rule in member.adapts
        if _condition(rule, member, known) is None
        and known.is_deferred(rule.when or rule.unless)
        and _would_change(member.chosen, rule)
    ]


def _condition(rule: Adapt, member: Declared, known: Known) -> bool | None:
    """Whether the adaptation is due; with both words it needs both to be so."""
    parts = []
    if rule.when:
        parts.append(known.holds(rule.when, member))
    if rule.unless:
        holds = known.holds(rule.unless, member)
        parts.append(None if holds is None else not holds)
    if False in parts or not parts:
        return False
    return None if None in parts else True


def _relation(rule: Adapt) -> str:
    return f"when {rule.when}" if rule.when else f"unless {rule.unless}"


def _would_change(chosen: Chosen, rule: Adapt) -> bool:
    return any(getattr(chosen.options, name, None) != new for name, new in rule.options.items())


def _adjusted_text(member: Declared, rule: Adapt, known: Known) -> str:
    options = ", ".join(f"{name}={value_text(new)}" for name, new in sorted(rule.options.items()))
    chosen = member.chosen
    given = [
        f"{name}={value_text(getattr(chosen.options, name))}"
        for name, new in sorted(rule.options.items())
        if name in changed_options(chosen) and getattr(chosen.options, name) != new
    ]
    instead = f" instead of your {', '.join(given)}" if given else ""
    reason = f", {rule.reason}" if rule.reason else ""
    return f"adjusted to {options}{instead}{reason}: {_cause(rule, member, known)}"


def _cause(rule: Adapt, member: Declared, known: Known) -> str:
    if rule.when:
        names = sorted({provider.name for provider in known.providers(rule.when, member)})
        token = find_token(rule.when)
        clause = token.holds if token else rule.when
        return f"{clause} ({', '.join(names)})" if names else clause
    token, lacking = find_token(rule.unless), known.lacking(rule.unless)
    if token is None or not lacking:
        return token.fails if token else f"no {rule.unless}"
    return "; ".join(
        f"{who.name} lacks {token.name} ({why})"
        if why
        else f"{who.name} does not state that {token.holds}"
        for who, why in lacking
    )


def _bad_adapt(member: Declared, rule: Adapt, error: BaseException | None) -> Finding:
    options = ", ".join(f"{name}={new!r}" for name, new in sorted(rule.options.items()))
    return Finding(
        "TW103",
        "error",
        who=(member.name,),
        what=f"{member.name} adapts to {options}, which it does not take: "
        f"{one_line(error) if error else ''}",
        why=f"its claims and its options do not fit together{member.source}",
        fix=f"leave {member.name!r} out, or tell its author",
    )


def _setting_conflicts(members: Sequence[Declared], asked: Settings) -> list[Finding]:
    wishes: dict[str, list[tuple[Declared, object, str]]] = {}
    for member in members:
        for setting, value, reason in member.sets:
            if setting in SETTINGS:
                wishes.setdefault(setting, []).append((member, value, reason))
    return [
        finding
        for setting, wanted in sorted(wishes.items())
        for finding in _conflicts_of(setting, wanted, getattr(asked, setting))
    ]


def _conflicts_of(
    setting: str, wanted: Sequence[tuple[Declared, object, str]], user: object
) -> list[Finding]:
    explicit = user != getattr(_DEFAULTS, setting)
    found = [
        Finding(
            "TW203",
            "error",
            who=(member.name,),
            what=f"{member.name} asks for {setting}={value_text(value)}, "
            f"the Trainer has {setting}={value_text(user)}",
            why=f"{reason}{member.source}" if reason else "",
            fix=f"leave out {setting}= or {member.name!r}, or give both one value",
        )
        for member, value, reason in wanted
        if explicit and value != user
    ]
    first, *others = wanted
    return found + [_two_wishes(setting, first, other) for other in others if other[1] != first[1]]


def _two_wishes(
    setting: str, first: tuple[Declared, object, str], other: tuple[Declared, object, str]
) -> Finding:
    wishes = [
        f"{member.name} asks for {setting}={value_text(v)}" for member, v, _ in (first, other)
    ]
    return Finding(
        "TW203",
        "error",
        who=(first[0].name, other[0].name),
        what=", ".join(wishes),
        why="; ".join(f"{m.name}: {reason}{m.source}" for m, _, reason in (first, other) if reason),
        fix="give both one value, or keep one of them",
    )
