"""In which order the members run: edges with reasons, one order for any listing, cycles."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

from torchweld.claims import Rel
from torchweld.resolving.declared import PHASES, Declared
from torchweld.resolving.findings import Finding, enumerate_words
from torchweld.spelling import did_you_mean, listing
from torchweld.vocabulary import find_slot


class Edge(NamedTuple):
    """``first`` runs before ``then``, for a reason."""

    first: str
    then: str
    reason: str


@dataclass(frozen=True)
class Ordered:
    """The members in the order in which they run."""

    members: tuple[Declared, ...]
    edges: tuple[Edge, ...]
    findings: tuple[Finding, ...]


Graph = dict[tuple[int, int], list[str]]
"""Pairs of places in the sorted members to the reasons of the edge between them."""


def order(members: Sequence[Declared]) -> Ordered:
    """Sort the members, which come sorted by phase and name, along every claimed order."""
    wishes = [*_claimed(members), *_from_slots(members), *_listed(members)]
    asked, findings = _asked_by_user(members)
    graph: Graph = {}
    for first, then, reason in (*wishes, *asked):
        if members[first].phase == members[then].phase:
            reasons = graph.setdefault((first, then), [])
            if reason not in reasons:
                reasons.append(reason)
    findings += [_across(members, *wish) for wish in _distinct_across(members, (*wishes, *asked))]
    places, cycles = _sorted_places(len(members), graph)
    findings += [_cycle(members, graph, cycle) for cycle in cycles]
    findings += _unordered(members, graph, places)
    by_phase = sorted(places, key=lambda place: PHASES.index(members[place].phase))
    return Ordered(tuple(members[i] for i in by_phase), _edges(members, graph), tuple(findings))


Wish = tuple[int, int, str]


def _claimed(members: Sequence[Declared]) -> Iterator[Wish]:
    """What members say themselves: before, after, and a provider before whoever requires it."""
    for me, member in enumerate(members):
        for rel in member.before:
            yield from ((me, to, _reason(member, rel)) for to in _targets(members, me, rel))
        for rel in member.after:
            yield from ((to, me, _reason(member, rel)) for to in _targets(members, me, rel))
        for rel in member.requires:
            yield from ((to, me, _reason(member, rel)) for to in _providers(members, me, rel))


def _targets(members: Sequence[Declared], me: int, rel: Rel) -> list[int]:
    """Who is meant: the component of that name, providers of that token, users of that slot."""
    return [
        other
        for other, member in enumerate(members)
        if other != me
        and (
            member.name == rel.target
            or rel.target in member.provides
            or (find_slot(rel.target) is not None and rel.target in member.touches())
        )
    ]


def _providers(members: Sequence[Declared], me: int, rel: Rel) -> list[int]:
    """Who provides that token in the same phase."""
    return [
        other
        for other, member in enumerate(members)
        if other != me and member.phase == members[me].phase and rel.target in member.provides
    ]


def _reason(member: Declared, rel: Rel) -> str:
    return rel.reason or f"{member.name} asks for it"


def _from_slots(members: Sequence[Declared]) -> Iterator[Wish]:
    """The owner of a slot and its editors, where the slot says who comes first."""
    for me, owner in enumerate(members):
        for rel in owner.owns:
            slot = find_slot(rel.target)
            if slot is None or slot.edits not in {"before", "after"}:
                continue
            for other, editor in enumerate(members):
                same = other != me and editor.phase == owner.phase
                if same and any(edit.target == slot.name for edit in editor.edits):
                    first, then = (other, me) if slot.edits == "before" else (me, other)
                    yield first, then, f"{slot.name} is edited {slot.edits} its owner: {slot.why}"


def _listed(members: Sequence[Declared]) -> Iterator[Wish]:
    """Bare functions say nothing about themselves; the user's list is their order."""
    bare = [place for place, member in enumerate(members) if member.chosen.position is not None]
    bare.sort(key=lambda place: members[place].chosen.position or 0)
    for first, then in pairwise(bare):
        yield first, then, "listed in this order"


def _asked_by_user(members: Sequence[Declared]) -> tuple[list[Wish], list[Finding]]:
    names = {member.name for member in members}
    wishes: list[Wish] = []
    findings = []
    for me, member in enumerate(members):
        for name in member.chosen.after:
            if name not in names:
                findings.append(_unknown(member, name, names))
            wishes += [
                (other, me, "you asked for it (after=)")
                for other, candidate in enumerate(members)
                if candidate.name == name and other != me
            ]
    return wishes, findings


def _unknown(member: Declared, name: str, names: Iterable[str]) -> Finding:
    others = set(names) - {member.name}
    return Finding(
        "TW101",
        "error",
        who=(member.name,),
        what=f"{member.name} is to come after {name!r}, which is not chosen",
        why=f"chosen: {listing(others)}",
        fix=did_you_mean(name, others) or f"take {name!r} out of after=",
    )


def _distinct_across(members: Sequence[Declared], wishes: Iterable[Wish]) -> list[Wish]:
    across = [wish for wish in wishes if members[wish[0]].phase != members[wish[1]].phase]
    return list(dict.fromkeys(across))


def _across(members: Sequence[Declared], first: int, then: int, reason: str) -> Finding:
    """An order between two phases: always so, or impossible."""
    one, other = members[first], members[then]
    always = PHASES.index(one.phase) < PHASES.index(other.phase)
    return Finding(
        "TW403",
        "note" if always else "error",
        who=(one.name, other.name),
        what=f"{one.name} ({one.phase}) is to come before {other.name} ({other.phase})",
        why=f"{reason}; the phases are always {', '.join(PHASES)}"
        + (": it is so without being asked for" if always else ""),
        fix="" if always else "order is chosen inside one phase only: take this one out",
    )


def _sorted_places(count: int, graph: Graph) -> tuple[list[int], list[list[int]]]:
    """Kahn's algorithm with the smallest place first; a cycle is cut at its smallest place."""
    waits = [0] * count
    for _, then in graph:
        waits[then] += 1
    ready = [place for place in range(count) if not waits[place]]
    left, places, cycles = set(range(count)), list[int](), list[list[int]]()
    while left:
        if not ready:
            cycles = cycles or _cycles(left, graph)
            cut = min(place for cycle in cycles for place in cycle if place in left)
            ready.append(cut)
        place = heapq.heappop(ready)
        if place not in left:
            continue
        left.discard(place)
        places.append(place)
        for first, then in graph:
            if first == place:
                waits[then] -= 1
                if not waits[then] and then in left:
                    heapq.heappush(ready, then)
    return places, cycles


def _cycles(left: set[int], graph: Graph) -> list[list[int]]:
    """Groups of places that all reach each other."""
    reach = _reachable(graph)
    groups = {
        frozenset(other for other in left if (place, other) in reach and (other, place) in reach)
        for place in left
        if (place, place) in reach
    }
    return sorted(sorted(group) for group in groups)


def _reachable(graph: Graph) -> set[tuple[int, int]]:
    """Every pair with a path from the first to the second."""
    following: dict[int, list[int]] = {}
    for first, then in graph:
        following.setdefault(first, []).append(then)
    pairs = set()
    for start, next_places in following.items():
        stack = list(next_places)
        while stack:
            place = stack.pop()
            if (start, place) not in pairs:
                pairs.add((start, place))
                stack += following.get(place, [])
    return pairs


def _cycle(members: Sequence[Declared], graph: Graph, cycle: Sequence[int]) -> Finding:
    inside = [pair for pair in sorted(graph) if pair[0] in cycle and pair[1] in cycle]
    steps = [
        f"{members[first].name} before {members[then].name}: {'; '.join(graph[first, then])}"
        for first, then in inside
    ]
    names = [members[place].name for place in cycle]
    return Finding(
        "TW401",
        "error",
        who=names,
        what=f"{enumerate_words(names)} each want to come before the other",
        why="; ".join(steps),
        fix="leave one of them out, or take out an after= of yours",
    )


def _unordered(members: Sequence[Declared], graph: Graph, places: Sequence[int]) -> list[Finding]:
    """A note for every pair that edits one slot and that nothing orders."""
    reach = _reachable(graph)
    findings = []
    for first, then in combinations(places, 2):
        one, other = members[first], members[then]
        both = {rel.target for rel in one.edits} & {rel.target for rel in other.edits}
        if one.phase != other.phase or _one_author(one, other):
            continue
        if not both or (first, then) in reach or (then, first) in reach:
            continue
        findings.append(
            Finding(
                "TW402",
                "note",
                who=(one.name, other.name),
                what=f"{one.name} and {other.name} both edit {enumerate_words(both)}, "
                "and nothing says which comes first",
                why=f"they run in the order of their names: {one.name}, then {other.name}",
                fix=f"choose it: use({one.name!r}, after={other.name!r}), or the other way round",
            )
        )
    return findings


def _one_author(one: Declared, other: Declared) -> bool:
    """Components of one distribution: their author orders them or tests that they commute."""
    first, second = one.chosen.origin.distribution, other.chosen.origin.distribution
    return bool(first) and first == second


def _edges(members: Sequence[Declared], graph: Graph) -> tuple[Edge, ...]:
    return tuple(
        Edge(members[first].name, members[then].name, "; ".join(reasons))
        for (first, then), reasons in sorted(graph.items())
    )
