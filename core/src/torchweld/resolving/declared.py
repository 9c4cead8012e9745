"""A chosen component together with what it claims, read once, checked and put into one form."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any

from torchweld.claims import Adapt, Claims, Phase, Rel, relations
from torchweld.components import Chosen, Settings
from torchweld.guard import attempt, one_line
from torchweld.identity import identity
from torchweld.resolving.findings import Finding
from torchweld.spelling import did_you_mean
from torchweld.vocabulary import SETTINGS, SLOTS, TOKENS, find_slot, find_token

PHASES: tuple[Phase, ...] = ("surgery", "data", "strategy")
"""In the order in which ``fit`` comes to them."""

_DEFAULT_OWNS: Mapping[Phase, tuple[str, ...]] = {
    "surgery": (),
    "data": ("data.loader",),
    "strategy": ("engine", "precision"),
}
_DEFAULT_EDITS: Mapping[Phase, tuple[str, ...]] = {
    "surgery": ("model.modules",),
    "data": (),
    "strategy": (),
}


@dataclass(frozen=True)
class Declared:
    """One member of a plan: the choice and its claims, every field of them a tuple.

    Members are compared by identity of their place in the plan, never by their claims.
    """

    chosen: Chosen
    owns: tuple[Rel, ...]
    edits: tuple[Rel, ...]
    provides: tuple[str, ...]
    lacks: Mapping[str, str]
    requires: tuple[Rel, ...]
    forbids: tuple[Rel, ...]
    before: tuple[Rel, ...]
    after: tuple[Rel, ...]
    adapts: tuple[Adapt, ...]
    sets: tuple[tuple[str, object, str], ...]
    settles: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """The component's name."""
        return self.chosen.name

    @property
    def phase(self) -> Phase:
        """The phase in which it takes part."""
        return self.chosen.phase

    @property
    def source(self) -> str:
        """Distribution and version, in brackets, for a reason that this member states."""
        return _origin_text(self.chosen)

    def touches(self) -> set[str]:
        """The slots it owns or edits."""
        return {rel.target for rel in (*self.owns, *self.edits)}


def sort_key(chosen: Chosen) -> tuple[Any, ...]:
    """Order of components that nothing else orders: phase and name, never the listing."""
    position = -1 if chosen.position is None else chosen.position
    return (
        PHASES.index(chosen.phase),
        chosen.name,
        chosen.split,
        position,
        chosen.origin.distribution,
        identity(chosen.options),
    )


def declare(chosen: Chosen, settings: Settings) -> tuple[Declared, list[Finding]]:
    """Read the claims of ``chosen``; unreadable ones become the defaults and a finding."""
    read = attempt(lambda: _declared(chosen, chosen.claims(settings)))
    if read.value is not None:
        return read.value, []
    cause = f": {one_line(read.error)}" if read.error else ""
    broken = Finding(
        "TW105",
        "error",
        who=(chosen.name,),
        what=f"the claims of {chosen.name!r} cannot be read{cause}",
        why=f"its plugin is broken{_origin_text(chosen)}",
        fix=f"leave {chosen.name!r} out, or tell its author",
    )
    return _declared(chosen, Claims()), [broken]


def unknown_words(member: Declared, names: Collection[str]) -> list[Finding]:
    """A finding for every slot, token or setting that no vocabulary knows.

    Args:
        member: whose claims to check.
        names: of all chosen components, which an order may name too.
    """
    slots = [rel.target for rel in (*member.owns, *member.edits)]
    tokens = [*member.provides, *member.lacks]
    tokens += [rel.target for rel in (*member.requires, *member.forbids)]
    tokens += [word for adapt in member.adapts for word in (adapt.when, adapt.unless) if word]
    # A bare word in an order is the name of a component, which may be one that is not chosen.
    orders = [rel.target for rel in (*member.before, *member.after) if "." in rel.target]
    orders = [word for word in orders if word not in names]
    settings = [name for name, _, _ in member.sets]
    return [
        *(_unknown(member, "slot", w, SLOTS) for w in _each(slots) if not find_slot(w)),
        *(_unknown(member, "token", w, TOKENS) for w in _each(tokens) if not find_token(w)),
        *(_unknown(member, "word", w, [*SLOTS, *TOKENS]) for w in _each(orders) if not _known(w)),
        *(_unknown(member, "setting", w, SETTINGS) for w in _each(settings) if w not in SETTINGS),
    ]


def with_options(chosen: Chosen, options: Mapping[str, object]) -> Chosen:
    """Return ``chosen`` with other values for some of its options.

    Raises:
        TypeError: there are no options of these names.
    """
    if chosen.options is None:
        raise TypeError(f"{chosen.name!r} has no options")
    return replace(chosen, options=replace(chosen.options, **options))


def options_text(chosen: Chosen) -> str:
    """The options that differ from their defaults, ``a=1, b='x'``."""
    changed = changed_options(chosen)
    return ", ".join(f"{name}={value_text(getattr(chosen.options, name))}" for name in changed)


def changed_options(chosen: Chosen) -> dict[str, object]:
    """The default of every option that has another value; a required one is always among them."""
    if chosen.options is None:
        return {}
    defaults = {field.name: _default(field) for field in fields(chosen.options)}
    return {
        name: default
        for name, default in defaults.items()
        if identity(getattr(chosen.options, name)) != identity(default)
    }


def value_text(value: object) -> str:
    """A value of an option or setting, as the plan prints it."""
    return identity(value)


def _declared(chosen: Chosen, claims: Claims) -> Declared:
    if not isinstance(claims, Claims):
        raise TypeError(f"expected Claims, got {type(claims).__name__}")
    provides = (claims.provides,) if isinstance(claims.provides, str) else tuple(claims.provides)
    adapts = (claims.adapts,) if isinstance(claims.adapts, Adapt) else tuple(claims.adapts)
    owns, edits = claims.owns, claims.edits
    return Declared(
        chosen,
        owns=_relations("owns", _DEFAULT_OWNS[chosen.phase] if owns is None else owns),
        edits=_relations("edits", _DEFAULT_EDITS[chosen.phase] if edits is None else edits),
        provides=_words("provides", provides),
        lacks={word: str(reason) for word, reason in claims.lacks.items()},
        requires=_relations("requires", claims.requires),
        forbids=_relations("forbids", claims.forbids),
        before=_relations("before", claims.before),
        after=_relations("after", claims.after),
        adapts=adapts,
        sets=tuple((setting, value, reason) for setting, value, reason in claims.sets),
        settles=tuple((what, why) for what, why in claims.settles),
    )


def _relations(field: str, value: Any) -> tuple[Rel, ...]:
    if value == ():
        return ()
    rels = relations(value)
    for rel in rels:
        if not isinstance(rel, Rel):
            raise TypeError(f"{field}: expected a name or a Rel, got {type(rel).__name__}")
    _words(field, tuple(rel.target for rel in rels))
    return rels


def _words(field: str, words: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"{field}: expected a word, got {word!r}")
    return words


def _default(field: Field[Any]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _each(words: Iterable[str]) -> list[str]:
    return sorted(set(words))


def _known(word: str) -> bool:
    return find_slot(word) is not None or find_token(word) is not None


def _unknown(member: Declared, kind: str, word: str, words: Iterable[str]) -> Finding:
    hint = did_you_mean(word, words)
    return Finding(
        "TW102",
        "error",
        who=(member.name,),
        what=f"the claims of {member.name!r} name {{}}, which is no {kind}",
        about=repr(word),
        why=f"a misspelt claim would be no claim at all{member.source}",
        fix=f"{hint} (its author can correct it)" if hint else "its author can correct it",
    )


def _origin_text(chosen: Chosen) -> str:
    origin = chosen.origin
    return f" ({origin.distribution} {origin.version})" if origin.distribution else ""
