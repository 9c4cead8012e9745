"""Pages that refer to each other by their places in the repository, laid out as those of a site."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".toml": "toml", ".md": "markdown"}


class BrokenLink(Exception):
    """A page refers to something that is not there."""


def place_of(path: PurePosixPath) -> PurePosixPath:
    """Where a file or folder of the repository is on the site."""
    name, parts = path.name, path.parts
    if path.suffix == ".svg":
        return PurePosixPath(*parts[1:])
    if parts[0] == "docs" and path.suffix in {".md", ""}:
        return PurePosixPath(*parts[1:]).with_suffix(".md")
    if "codes" in parts:
        return PurePosixPath("codes", name)
    if parts[0] in {"core", "plugins"} and name in {"README.md", "CHANGELOG.md"}:
        package = "torchweld" if parts[0] == "core" else f"torchweld-{parts[1]}"
        return PurePosixPath("packages" if name == "README.md" else "changes", f"{package}.md")
    if path.suffix == ".md":
        folder = path.parent.name.lower()
        return PurePosixPath(f"{folder}-{name.lower()}" if folder else name.lower())
    return PurePosixPath("source", f"{path}.md")


class Site:
    """Collects pages, and whatever they refer to, until nothing new is found.

    Args:
        root: of the repository.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pages: dict[PurePosixPath, str | bytes] = {}
        self._waiting: list[PurePosixPath] = []

    def add(self, path: PurePosixPath) -> PurePosixPath:
        """Take a file or folder in; returns its place on the site."""
        place = place_of(path)
        if place not in self.pages:
            self.pages[place] = ""
            self._waiting.append(path)
        return place

    def collect(self) -> None:
        """Read everything that was added, and what that refers to.

        Raises:
            BrokenLink: a page refers to a file that does not exist.
        """
        while self._waiting:
            path = self._waiting.pop()
            self.pages[place_of(path)] = self._content(path)

    def write(self, folder: Path) -> None:
        """Write all pages into ``folder``."""
        for place, content in self.pages.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content if isinstance(content, bytes) else content.encode())

    def _content(self, path: PurePosixPath) -> str | bytes:
        file = self.root / path
        if path.suffix == ".svg":
            return file.read_bytes()
        if file.is_dir():
            return self._listing(path)
        text = file.read_text("utf-8")
        if path.suffix == ".md":
            return self._linked(text, path)
        fence = f"````{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"
        return f"# {path}\n\n{fence}"

    def _listing(self, path: PurePosixPath) -> str:
        files = (p for p in sorted((self.root / path).iterdir()) if p.suffix in _LANGUAGES)
        places = {file: self.add(path / file.name) for file in files}
        lines = [
            f"- [{_title(file)}]({_relative(place, place_of(path))})"
            for file, place in places.items()
        ]
        return "\n".join([f"# {path}", "", *lines, ""])

    def _linked(self, text: str, path: PurePosixPath) -> str:
        def replace(match: re.Match[str]) -> str:
            target, _, anchor = match[2].partition("#")
            if not target or re.match(r"\w+:", target):
                return match[0]
            place = self.add(self._resolve(target, path))
            suffix = f"#{anchor}" if anchor else ""
            return f"{match[1]}{_relative(place, place_of(path))}{suffix}{match[3]}"

        return _outside_fences(text, lambda part: LINK.sub(replace, part))

    def _resolve(self, target: str, path: PurePosixPath) -> PurePosixPath:
        found = PurePosixPath(os.path.normpath(path.parent / target))
        if not (self.root / found).exists():
            raise BrokenLink(f"{path} refers to {target!r}, and there is no {found}")
        return found


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Change a page, but no block of code."""

    def parts() -> Iterator[str]:
        for part in FENCE.split(text):
            yield part if part.startswith("```") else change(part)

    return "".join(parts())


def _title(file: Path) -> str:
    """The heading of a page, the name of any other file."""
    if file.suffix != ".md":
        return f"`{file.name}`"
    return file.read_text("utf-8").partition("\n")[0].lstrip("# ")


def _relative(place: PurePosixPath, page: PurePosixPath) -> str:
    return os.path.relpath(place, page.parent)
