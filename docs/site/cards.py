"""The card of every component, made from the component itself."""

from __future__ import annotations

import inspect
import io
import tokenize
from collections.abc import Iterable, Mapping

from torchweld import Settings
from torchweld.claims import Adapt, Phase, Rel
from torchweld.components import Chosen
from torchweld.plugins.options import option_rows
from torchweld.registry import Registry
from torchweld.resolving.declared import Declared, declare

PHASES: Mapping[Phase, str] = {
    "strategy": "Strategies",
    "data": "Data sources",
    "surgery": "Surgeries",
}
_RELATIONS = {
    "owns": "It takes over",
    "edits": "It changes",
    "requires": "It requires",
    "forbids": "It cannot work with",
    "before": "It comes before",
    "after": "It comes after",
}


def installed() -> tuple[Chosen, ...]:
    """Every component of this environment with its default options, by phase and name."""
    order = list(PHASES)
    chosen = Registry.installed().offered(Settings())
    return tuple(sorted(chosen, key=lambda c: (order.index(c.phase), c.name)))


def overview(components: Iterable[Chosen]) -> str:
    """The page that lists all cards."""
    lines = ["# Components", "", "Each card is generated from what the component says of itself."]
    shown = None
    for chosen in components:
        if chosen.phase != shown:
            lines += [
                "",
                f"## {PHASES[chosen.phase]}",
                "",
                "| name | does | comes with |",
                "|---|---|---|",
            ]
            shown = chosen.phase
        name, summary = chosen.name, _cell(chosen.component.summary)
        lines.append(
            f"| [`{name}`](components/{name}.md) | {summary} | {chosen.origin.distribution} |"
        )
    return "\n".join([*lines, ""])


def card(chosen: Chosen) -> str:
    """Name, summary, needs, options, presets, and all claims with their reasons."""
    component = chosen.component
    lines = [f"# {chosen.name}", "", f"{component.summary}.", ""]
    lines += [f"A {_word(chosen.phase)} of {chosen.origin.distribution}.", ""]
    if component.needs:
        lines += [f"Needs {', '.join(f'`{need}`' for need in component.needs)}.", ""]
    lines += _options(component.options)
    lines += _presets(component.presets)
    return "\n".join([*lines, *_claims(declare(chosen, Settings())[0])])


def _word(phase: Phase) -> str:
    return "data source" if phase == "data" else phase


def _options(options: type | None) -> list[str]:
    meanings = comments(options) if options is not None else {}
    rows = [
        f"| `{name}` | `{_cell(kind)}` | `{_cell(default)}` | {_cell(meanings.get(name, ''))} |"
        for name, kind, default in option_rows(options)
    ]
    if not rows:
        return ["It has no options.", ""]
    return [
        "## Options",
        "",
        "| option | type | default | meaning |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def comments(options: type) -> dict[str, str]:
    """What stands behind each field of a dataclass, over several lines if need be."""
    found: dict[str, str] = {}
    name, depth = "", 0
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(options)).readline):
        is_field = token.type == tokenize.NAME and token.start[1] == 4 and depth == 1
        if token.type in {tokenize.INDENT, tokenize.DEDENT}:
            depth += 1 if token.type == tokenize.INDENT else -1
        elif is_field and token.line[token.end[1] :].startswith(":"):
            name = token.string
        elif token.type == tokenize.COMMENT and name and depth == 1:
            text = token.string.lstrip("# ")
            found[name] = f"{found[name]} {text}" if name in found else text
        elif is_field:  # a method, a decorator
            name = ""
    return found


def _presets(presets: Mapping[str, Mapping[str, object]]) -> list[str]:
    if not presets:
        return []
    rows = [f"- `{name}`: {_keywords(options)}" for name, options in sorted(presets.items())]
    return ["## Other names", "", *rows, ""]


def _claims(member: Declared) -> list[str]:
    lines = ["## Claims", "", "With the options at their defaults and precision `32`:", ""]
    for field, heading in _RELATIONS.items():
        lines += [f"- {heading} {_relation(rel)}" for rel in getattr(member, field)]
    if member.provides:
        lines.append(f"- It provides {', '.join(f'`{word}`' for word in sorted(member.provides))}.")
    lines += [f"- It lacks `{word}`: {why}." for word, why in sorted(member.lacks.items())]
    lines += [f"- It takes {_adaptation(adapt)}" for adapt in member.adapts]
    lines += [f"- It sets `{name}` to `{value!r}`: {why}." for name, value, why in member.sets]
    lines += [f"- It settles: {what} - {why}." for what, why in member.settles]
    return [*lines, ""]


def _relation(rel: Rel) -> str:
    reason = f": {rel.reason}" if rel.reason else ""
    fix = f"; {rel.fix}" if rel.fix else ""
    kind = " (a warning)" if rel.severity == "warning" else ""
    return f"`{rel.target}`{kind}{reason}{fix}."


def _adaptation(adapt: Adapt) -> str:
    holds = f"while `{adapt.when}` holds" if adapt.when else f"unless `{adapt.unless}` holds"
    return f"{_keywords(adapt.options)} {holds}: {adapt.reason}."


def _keywords(options: Mapping[str, object]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in options.items())


def _cell(text: str) -> str:
    """Text inside a table."""
    return text.replace("|", "\\|")
