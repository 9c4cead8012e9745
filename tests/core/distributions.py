"""Real distributions in a temporary directory, broken ones too."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

OFFER = """
from torchweld import Component, hookimpl

{name} = Component(name="{name}", summary="does {name}", build="{module}.impl:make"{more})

@hookimpl
def torchweld_surgeries():
    return [{name}]
"""
"""Source of a plugin that offers one surgery."""


@dataclass
class Site:
    """A directory of installed distributions.

    Attributes:
        path: the directory; somebody puts it on ``sys.path``.
        names: distributions written so far.
    """

    path: Path
    names: list[str] = field(default_factory=list)

    def plugin(
        self,
        name: str,
        *,
        source: str = "",
        more: str = "",
        version: str = "1.0",
        distribution: str = "",
        entry_point: str = "",
        requires: str = "",
    ) -> None:
        """Install a plugin that offers the surgery ``name``, or the module ``source``."""
        module = f"torchweld_{entry_point or name}".replace("-", "_")
        self.install(
            distribution or f"torchweld-{name}",
            version=version,
            entry_points=f"[torchweld]\n{entry_point or name} = {module}\n",
            modules={module: source or OFFER.format(name=name, module=module, more=more)},
            requires=requires,
        )

    def install(
        self,
        distribution: str,
        *,
        version: str = "1.0",
        entry_points: str | bytes = "",
        modules: dict[str, str] | None = None,
        requires: str = "",
    ) -> Path:
        """Write a ``.dist-info`` and modules; return the ``.dist-info``."""
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        needs = "".join(f"Requires-Dist: {text}\n" for text in requires.split(";") if text)
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{needs}"
        (info / "METADATA").write_text(metadata)
        (info / "RECORD").write_text("")
        if isinstance(entry_points, str):
            entry_points = dedent(entry_points).encode()
        (info / "entry_points.txt").write_bytes(entry_points)
        for module, source in (modules or {}).items():
            (self.path / f"{module}.py").write_text(dedent(source))
        self.names.append(distribution)
        importlib.invalidate_caches()
        return info

    def install_unrelated(self, count: int) -> None:
        """Install distributions that have nothing to do with torchweld."""
        for number in range(count):
            scripts = f"[console_scripts]\nother{number} = other{number}:main\n"
            self.install(f"other-{number}", entry_points=scripts)


def break_everything(site: Site) -> None:
    """Install one of every breakage, each called after what is wrong with it."""
    for break_it in BREAKAGES.values():
        break_it(site)


def _raises(site: Site) -> None:
    site.plugin("raises", source="raise OSError('no licence file')")


def _exits(site: Site) -> None:
    site.plugin("exits", source="import sys\nsys.exit(3)")


def _syntax(site: Site) -> None:
    site.plugin("syntax", source="def oops(:\n    pass\n")


def _recursion(site: Site) -> None:
    site.plugin("recursion", source="def f():\n    return f()\nf()\n")


def _missing_module(site: Site) -> None:
    site.plugin("peftless", source="import peft_of_nobody", requires="peft-of-nobody>=0.10")


def _malformed_entry_point(site: Site) -> None:
    site.install("torchweld-malformed", entry_points="[torchweld]\nmalformed = not a module!\n")


def _malformed_elsewhere(site: Site) -> None:
    site.install("unrelated", entry_points="[console_scripts]\nbad = not a module!\n")


def _binary(site: Site) -> None:
    site.install("torchweld-binary", entry_points=b"\xff\xfe\x00[torchweld]\x9d\x81")


def _without_metadata(site: Site) -> None:
    info = site.install("torchweld-leftover", entry_points="[torchweld]\nleftover = leftover\n")
    (info / "METADATA").unlink()


def _without_metadata_elsewhere(site: Site) -> None:
    (site.install("empty") / "METADATA").unlink()


def _two_offer_one_name(site: Site) -> None:
    site.plugin("twin", distribution="torchweld-twin-a", entry_point="twin-a")
    site.plugin("twin", distribution="torchweld-twin-b", entry_point="twin-b")


def _wrong_hook(site: Site) -> None:
    _offers_and(site, "wrong_hook", "def torchweld_surgerys():\n    return []")


def _wrong_argument(site: Site) -> None:
    _offers_and(site, "wrong_argument", "def torchweld_adopt(thing, phase):\n    return None")


def _keyword_only(site: Site) -> None:
    _offers_and(site, "keyword_only", "def torchweld_adopt(obj, *, phase):\n    return None")


def _offers_and(site: Site, name: str, hook: str) -> None:
    offer = OFFER.format(name=name, module=f"torchweld_{name}", more="")
    site.plugin(name, source=f"{offer}\n@hookimpl\n{hook}\n")


def _no_hook(site: Site) -> None:
    site.plugin("no_hook", source="def torchweld_other():\n    return []\n")


def _a_class(site: Site) -> None:
    offer = OFFER.format(name="a_class", module="torchweld_a_class", more="")
    hook = "class Plugin:\n    torchweld_surgeries = torchweld_surgeries\n"
    entry = "[torchweld]\na_class = torchweld_a_class:Plugin\n"
    site.install(
        "torchweld-a_class", entry_points=entry, modules={"torchweld_a_class": offer + hook}
    )


def _unmarked(site: Site) -> None:
    site.plugin("unmarked", source="def torchweld_surgeries():\n    return []\n")


def _hook_raises(site: Site) -> None:
    source = "from torchweld import hookimpl\n\n@hookimpl\ndef torchweld_surgeries():\n    {}\n"
    site.plugin("hook_raises", source=source.format("raise KeyError('x')"))
    site.plugin("hook_yields", source=source.format("yield 1 / 0"))
    site.plugin("hook_returns", source=source.format("return 7"))
    site.plugin("hook_strings", source=source.format("return ['blurpool']"))


def _newer_api(site: Site) -> None:
    site.plugin("newer", more=", api=99")


BREAKAGES = {
    "raises": _raises,
    "exits": _exits,
    "syntax": _syntax,
    "recursion": _recursion,
    "peftless": _missing_module,
    "malformed": _malformed_entry_point,
    "unrelated": _malformed_elsewhere,
    "torchweld-binary": _binary,
    "leftover": _without_metadata,
    "empty": _without_metadata_elsewhere,
    "twin": _two_offer_one_name,
    "wrong_hook": _wrong_hook,
    "wrong_argument": _wrong_argument,
    "keyword_only": _keyword_only,
    "no_hook": _no_hook,
    "a_class": _a_class,
    "unmarked": _unmarked,
    "hook_raises": _hook_raises,
    "newer": _newer_api,
}
"""Everything that discovery survives, by the name that a user would select."""
