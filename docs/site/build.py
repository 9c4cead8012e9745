"""Build the documentation as a static site that needs no network: ``python -m docs.site.build``.

The pages are those of the repository, the files that they show, a card for every component that is
installed, and a page for every code. Whatever mkdocs warns of is an error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath

from docs.site import cards
from docs.site.links import Site
from torchweld.problems import TITLES

ROOT = Path(__file__).parents[2]
# What is not listed here is found under "More".
NAVIGATION: dict[str, list[str]] = {
    "Train": [
        "getting-started.md",
        "launching.md",
        "coming-from.md",
        "examples.md",
        "language-model.md",
        "several-models.md",
        "commands.md",
    ],
    "Look up": ["components.md", "codes.md"],
    "Extend": ["plugin-author.md", "contracts.md"],
    "Understand": ["architecture.md", "decisions.md"],
}
SETTINGS = {
    "site_name": "torchweld",
    # Opened from a folder, a link must lead to a file; nothing is loaded from elsewhere.
    "use_directory_urls": False,
    "theme": {"name": "mkdocs", "highlightjs": False, "locale": "en"},
    "markdown_extensions": ["tables", "fenced_code", "sane_lists", {"toc": {"permalink": True}}],
    "validation": {
        "links": {"absolute_links": "warn", "unrecognized_links": "warn", "anchors": "warn"},
        "nav": {"omitted_files": "ignore"},
    },
}


def gather() -> Site:
    """All pages, before mkdocs sees them."""
    site = Site(ROOT)
    for page in sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")]):
        site.add(PurePosixPath(page.relative_to(ROOT)))
    for code in [*TITLES, "TW6xx"]:
        site.add(PurePosixPath("core/src/torchweld/codes", f"{code}.md"))
    site.collect()
    components = cards.installed()
    site.pages[PurePosixPath("components.md")] = cards.overview(components)
    for chosen in components:
        site.pages[PurePosixPath("components", f"{chosen.name}.md")] = cards.card(chosen)
    return site


def navigation(site: Site) -> list[object]:
    """The menu: chosen pages under chosen headings, then all others."""
    listed = {page for pages in NAVIGATION.values() for page in pages}
    there = [str(place) for place in sorted(site.pages) if place.suffix == ".md"]
    top = [p for p in there if "/" not in p and p != "index.md" and p not in listed]
    packages = [p for p in there if p.startswith("packages/")]
    return [
        {"Home": "index.md"},
        *({heading: pages} for heading, pages in NAVIGATION.items()),
        {"Packages": packages},
        {"More": top},
    ]


def build(output: Path) -> None:
    """Write the site into ``output``.

    Raises:
        BrokenLink: a page refers to something that is not there.
        CalledProcessError: mkdocs found something to warn of, and has printed it.
    """
    site = gather()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site.write(folder / "pages")
        settings = {
            **SETTINGS,
            "docs_dir": "pages",
            "site_dir": str(output.resolve()),
            "nav": navigation(site),
        }
        # JSON is YAML too.
        (folder / "mkdocs.yml").write_text(json.dumps(settings), "utf-8")
        # Not --quiet: warnings that are not printed are not counted either.
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
        subprocess.run([*command, "--config-file", str(folder / "mkdocs.yml")], check=True)


def main() -> None:
    """Build into the folder that is named, ``.site`` otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / ".site")
    build(parser.parse_args().output)


if __name__ == "__main__":
    main()
