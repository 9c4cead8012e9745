"""What is known about every token: who provides it, and whether it holds, yes, no or not yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchweld.components import Settings
from torchweld.errors import InvalidArgument
from torchweld.resolving.declared import Declared
from torchweld.spelling import did_you_mean
from torchweld.vocabulary import TOKENS, find_token, proofs


class Known:
    """Answers for one set of members under known settings and facts."""

    def __init__(
        self, members: Sequence[Declared], settings: Settings, facts: Mapping[str, bool]
    ) -> None:
        self.members = tuple(members)
        self._facts = {**_facts_of(settings), **facts}
        phases = {(member.phase, member.chosen.split) for member in members}
        self._has_strategy = ("strategy", "") in phases
        self._complete = self._has_strategy and ("data", "") in phases

    def providers(self, token: str, asker: Declared) -> list[Declared]:
        """The members other than ``asker`` that make ``token`` hold."""
        enough = set(proofs(token))
        return [
            member
            for member in self.members
            # The loader of the other splits says nothing about training.
            if member is not asker
            and member.chosen.split != "val"
            and not enough.isdisjoint(member.provides)
        ]

    def holds(self, token: str, asker: Declared) -> bool | None:
        """Whether ``token`` holds, seen from ``asker``; its own word does not count for itself.

        None means that nobody can know: a run or fit token without a fact, or a token that a
        strategy or data source could provide while none is chosen.
        """
        if self.providers(token, asker):
            return True
        if token in self._facts:
            return self._facts[token]
        if self.is_deferred(token):
            return None
        known = find_token(token)
        decided = self._has_strategy if known and known.source == "strategy" else self._complete
        return False if decided else None

    def is_deferred(self, token: str) -> bool:
        """Whether ``token`` is decided after the launch or at fit, and no fact is here yet."""
        known = find_token(token)
        return known is not None and known.source in {"run", "fit"} and token not in self._facts

    def lacking(self, token: str) -> list[tuple[Declared, str]]:
        """Who does not provide ``token``, with the reason where one is stated."""
        known = find_token(token)
        by_strategy = known is not None and known.source == "strategy"
        return [
            (member, next((member.lacks[t] for t in proofs(token) if t in member.lacks), ""))
            for member in self.members
            if token in member.lacks or (by_strategy and member.phase == "strategy")
        ]


def check_facts(facts: Mapping[str, bool]) -> None:
    """Refuse a fact under a name that no token has.

    Raises:
        InvalidArgument: a key is no token; it would decide nothing, without a word.
    """
    for name in facts:
        if find_token(name) is None:
            hint = did_you_mean(name, TOKENS) or f"the tokens are {', '.join(sorted(TOKENS))}"
            raise InvalidArgument(f"facts name {name!r}, which is no token; {hint}")


def _facts_of(settings: Settings) -> dict[str, bool]:
    """What the settings decide while planning."""
    facts = {
        "precision.reduced": settings.precision != "32",
        "precision.fp16": settings.precision == "16",
        "compile": bool(settings.compile),
        "activation_checkpointing": bool(settings.activation_checkpointing),
    }
    if settings.accelerator != "auto":
        facts["device.cuda"] = settings.accelerator == "cuda"
    return facts
