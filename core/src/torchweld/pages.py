"""The page of every problem code, as ``torchweld explain TW302`` prints it."""

from __future__ import annotations

from importlib.resources import files

from torchweld.errors import InvalidArgument

_PLUGINS_OWN = "TW6xx"


def page_codes() -> tuple[str, ...]:
    """The codes that have a page, sorted; ``TW6xx`` stands for the plugins' own checks."""
    pages = (files("torchweld") / "codes").iterdir()
    return tuple(sorted(page.name.removesuffix(".md") for page in pages if page.name[:2] == "TW"))


def code_page(code: str) -> str:
    """Return the page of ``code`` as Markdown; the case does not matter.

    Raises:
        InvalidArgument: there is no such code.
    """
    wanted = code.strip().upper().replace("X", "x")
    if wanted.startswith("TW6") and len(wanted) == len(_PLUGINS_OWN):
        wanted = _PLUGINS_OWN
    known = page_codes()
    if wanted not in known:
        raise InvalidArgument(f"there is no code {code!r}; the codes are {', '.join(known)}")
    return (files("torchweld") / "codes" / f"{wanted}.md").read_text(encoding="utf-8")
