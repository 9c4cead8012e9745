"""Who may not run together: two owners, forbidden edits, missing and forbidden facts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations
from typing import NamedTuple

from torchweld.claims import Rel
from torchweld.resolving.adaptation import pending
from torchweld.resolving.declared import PHASES, Declared
from torchweld.resolving.findings import Finding, enumerate_words
from torchweld.resolving.known import Known
from torchweld.vocabulary import Slot, Token, find_slot, find_token


class Deferred(NamedTuple):
    """A relation that is decided after the launch or at fit.

    Attributes:
        component: who states it.
        relation: ``"loss.visible"`` must hold, ``"not loss.smooths"`` must not; ``"when X"`` and
            ``"unless X"`` are conditions of an adaptation.
        reason: why, in the component's words.
    """

    component: str
    relation: str
    reason: str

    @property
    def token(self) -> str:
        """The token that decides it."""
        return self.relation.rpartition(" ")[2]


def find_conflicts(members: Sequence[Declared], known: Known) -> list[Finding]:
    """Every conflict between the members, and between a member and a known fact."""
    findings = [*_repeated(members), *_owners(members), *_forbidden_edits(members)]
    for member in members:
        for rel in member.requires:
            findings += _missing(member, rel, known)
        for rel in member.forbids:
            findings += _forbidden(member, rel, known)
    return findings


def find_deferred(members: Sequence[Declared], known: Known) -> tuple[Deferred, ...]:
    """The relations that nobody can decide yet, sorted."""
    found = {Deferred(member.name, what, why) for member, what, why in pending(members, known)}
    for member in members:
        for word, rels in (("", member.requires), ("not ", member.forbids)):
            found |= {
                Deferred(member.name, word + rel.target, rel.reason)
                for rel in rels
                if known.is_deferred(rel.target) and known.holds(rel.target, member) is None
            }
    return tuple(sorted(found))


def _repeated(members: Sequence[Declared]) -> list[Finding]:
    """A component takes part once; two different functions may share a name."""
    seen: set[tuple[str, str, str]] = set()
    findings = []
    for member in members:
        place = (member.phase, member.name, member.chosen.split)
        if place in seen and member.chosen.position is None:
            findings.append(
                Finding(
                    "TW203",
                    "error",
                    who=(member.name,),
                    what=f"{member.name!r} is chosen twice",
                    why="a component takes part once, with one set of options",
                    fix="keep one of them",
                )
            )
        seen.add(place)
    return findings


def _owners(members: Sequence[Declared]) -> list[Finding]:
    findings = []
    for first, second in combinations(members, 2):
        if first.chosen.split != second.chosen.split and first.phase == second.phase == "data":
            continue  # one loader a split
        for slot, rel, other in _shared(first.owns, second.owns):
            if slot.exclusive:
                own = [f"{r.reason}{m.source}" for r, m in ((rel, first), (other, second))]
                reasons = [text for text, r in zip(own, (rel, other), strict=True) if r.reason]
                findings.append(
                    Finding(
                        "TW201",
                        "error",
                        who=(first.name, second.name),
                        what=f"{first.name} and {second.name} both own {{}}",
                        about=slot.name,
                        why="; ".join([slot.why, *reasons]),
                        fix=rel.fix or other.fix,
                    )
                )
    return findings


def _shared(first: Sequence[Rel], second: Sequence[Rel]) -> list[tuple[Slot, Rel, Rel]]:
    others = {rel.target: rel for rel in second}
    slots = [(find_slot(rel.target), rel) for rel in first if rel.target in others]
    return [(slot, rel, others[slot.name]) for slot, rel in slots if slot]


def _forbidden_edits(members: Sequence[Declared]) -> list[Finding]:
    findings = []
    for owner, editor in permutations(members, 2):
        for slot, own, edit in _shared(owner.owns, editor.edits):
            why = _edit_problem(slot, owner, editor)
            if why:
                findings.append(_edit_finding(slot, (owner, own), (editor, edit), why))
    return findings


def _edit_problem(slot: Slot, owner: Declared, editor: Declared) -> str:
    """Why ``editor`` may not edit what ``owner`` owns; empty when it may."""
    if slot.edits == "forbidden":
        return slot.why
    distance = PHASES.index(editor.phase) - PHASES.index(owner.phase)
    late, early = slot.edits == "before" and distance > 0, slot.edits == "after" and distance < 0
    if late or early:
        return (
            f"{slot.why}; it can be edited only {slot.edits} {owner.name}, "
            f"but the {editor.phase} comes {'after' if late else 'before'} the {owner.phase}"
        )
    return ""


def _edit_finding(
    slot: Slot, owner: tuple[Declared, Rel], editor: tuple[Declared, Rel], why: str
) -> Finding:
    (owning, own), (editing, edit) = owner, editor
    return Finding(
        "TW202",
        "error",
        who=(owning.name, editing.name),
        what=f"{editing.name} edits {{}}, which {owning.name} owns",
        about=slot.name,
        why=f"{own.reason}{owning.source}" if own.reason else why,
        fix=edit.fix or own.fix,
    )


def _missing(member: Declared, rel: Rel, known: Known) -> list[Finding]:
    token = find_token(rel.target)
    if token is None or known.holds(token.name, member) is not False:
        return []
    lacking = [(who, why) for who, why in known.lacking(token.name) if who is not member]
    names = enumerate_words(who.name for who, _ in lacking)
    nobody = token.fails if token.source in {"run", "fit"} else "which nothing here provides"
    absent = f"which {names} does not provide" if lacking else nobody
    return [
        Finding(
            "TW301",
            rel.severity,
            who=(member.name, *(who.name for who, _ in lacking)),
            what=f"{member.name} needs {{}}, {absent}"
            if lacking
            else _alone(member, token, nobody),
            about=token.name,
            why="; ".join([f"{rel.reason or token.why}{member.source}", *_whys(token, lacking)]),
            fix=rel.fix,
        )
    ]


def _alone(member: Declared, token: Token, absent: str) -> str:
    """The token stands in the clause itself: two of these are two findings, not one."""
    return f"{member.name} needs {token.name}, {'but ' if absent == token.fails else ''}{absent}"


def _whys(token: Token, lacking: Sequence[tuple[Declared, str]]) -> list[str]:
    return [
        f"{who.name} lacks {token.name}: {why}{who.source}"
        if why
        else f"{who.name} does not state that {token.holds}"
        for who, why in lacking
    ]


def _forbidden(member: Declared, rel: Rel, known: Known) -> list[Finding]:
    token = find_token(rel.target)
    if token is None or known.holds(token.name, member) is not True:
        return []
    why = f"{rel.reason or token.why}{member.source}"
    providers = known.providers(token.name, member)
    can = "should not" if rel.severity == "warning" else "cannot"
    if not providers:
        what = f"{member.name} {can} run here: {token.holds} ({token.name})"
        return [Finding("TW302", rel.severity, (member.name,), what, why=why, fix=rel.fix)]
    return [
        Finding(
            "TW302",
            rel.severity,
            who=(member.name, other.name),
            what=f"{enumerate_words((member.name, other.name))} {can} run together",
            why=why,
            fix=rel.fix,
        )
        for other in providers
    ]
