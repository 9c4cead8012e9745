from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import importlib_metadata
import pytest

from tests.core.distributions import BREAKAGES, Site, break_everything
from torchweld.planning import make_plan
from torchweld.plugins.discovery import discover
from torchweld.plugins.inventory import Inventory, take_stock
from torchweld.problems import Problem
from torchweld.registry import Registry

# What is wrong, as the one line says it; None: it is nobody's plugin, or wrong only when selected.
SAYS = {
    "raises": "OSError: no licence file",
    "exits": "SystemExit: 3",
    "syntax": "SyntaxError",
    "recursion": "RecursionError",
    "peftless": "No module named 'peft_of_nobody'",
    "malformed": "malformed entry point 'not a module!'",
    "unrelated": None,
    "torchweld-binary": "UnicodeDecodeError",
    "leftover": "METADATA cannot be read",
    "empty": None,
    "twin": None,
    "wrong_hook": "no hook 'torchweld_surgerys'; did you mean 'torchweld_surgeries'?",
    "wrong_argument": "torchweld_adopt has no argument 'thing'; it takes (obj, phase)",
    "keyword_only": "takes 'phase' by keyword only",
    "no_hook": "implements no hook",
    "a_class": "it is the class 'Plugin', not a module or an instance",
    "unmarked": "torchweld_surgeries is not marked with torchweld.hookimpl",
    "hook_raises": "torchweld_surgeries raised KeyError: 'x'",
    "newer": "written for api 99",
}
CODES = {"newer": "TW106", "twin": "TW104", "unrelated": "TW101", "empty": "TW101"}


def stock(**environ: str) -> Inventory:
    return take_stock(environ)


def errors_of(surgery: str) -> list[Problem]:
    plan = make_plan(Registry.installed({}), strategy="single", data="torch", surgery=surgery)
    return [problem for problem in plan.problems if problem.severity == "error"]


def ours(inventory: Inventory, site: Site) -> list[str]:
    return [b.error for b in inventory.broken if b.location in {str(site.path), "sys.meta_path"}]


@pytest.mark.parametrize("name", BREAKAGES)
def test_discovery_survives_one_breakage_and_says_it_in_one_line(site: Site, name: str) -> None:
    BREAKAGES[name](site)
    site.plugin("healthy")

    found = stock()

    said = SAYS[name]
    assert found.named("surgery", "healthy")
    if said is None:
        assert ours(found, site) == []
    else:
        assert any(said in error for error in ours(found, site))
    assert not any("\n" in error for error in ours(found, site))


@pytest.mark.parametrize("name", BREAKAGES)
def test_selecting_what_is_broken_is_an_error_that_names_it(site: Site, name: str) -> None:
    break_everything(site)

    errors = errors_of(name)

    assert [error.code for error in errors] == [CODES.get(name, "TW105")]
    assert name in errors[0].what
    assert (SAYS[name] or "") in f"{errors[0].what} {errors[0].why}"


def test_all_breakages_together_leave_the_healthy_plugin_usable(site: Site) -> None:
    break_everything(site)
    site.plugin("healthy")

    found = stock()
    errors = errors_of("healthy")

    said = [text for text in SAYS.values() if text]
    assert [t for t in said if not any(t in error for error in ours(found, site))] == []
    assert errors == []


def test_one_malformed_entry_point_does_not_hide_its_neighbour(site: Site) -> None:
    entries = "[torchweld]\nbad = no module!\ngood = torchweld_good\n"
    site.plugin("good")
    info = site.path / "torchweld_good-1.0.dist-info"
    (info / "entry_points.txt").write_text(entries)

    found = stock()

    assert found.named("surgery", "good")
    assert [b.entry_point for b in found.broken if b.location == str(site.path)] == ["bad"]


def test_ctrl_c_during_an_import_is_not_swallowed(site: Site) -> None:
    site.plugin("slow", source="raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        stock()


def test_a_missing_module_is_answered_with_the_plugins_own_requirement(site: Site) -> None:
    BREAKAGES["peftless"](site)

    (broken,) = (b for b in stock().broken if b.entry_point == "peftless")

    assert "its metadata asks for peft-of-nobody>=0.10, which is not installed" in broken.hint
    assert "TORCHWELD_DISABLE=peftless" in broken.hint


def test_a_missing_module_that_no_requirement_brings_is_not_guessed(site: Site) -> None:
    site.plugin("vague", source="import module_of_nobody", requires="click>=1")

    (broken,) = (b for b in stock().broken if b.entry_point == "vague")

    assert "asks for nothing that would bring 'module_of_nobody'" in broken.hint
    assert "pip" not in broken.hint


@pytest.mark.parametrize("name", ["lora", "LoRA", "torchweld_lora", "torchweld-lora", " x, lora"])
def test_a_disabled_plugin_is_not_imported(site: Site, name: str) -> None:
    site.plugin("lora", source="import pathlib\npathlib.Path(__file__ + '.ran').touch()")

    found = stock(TORCHWELD_DISABLE=name)

    assert not list(site.path.glob("*.ran"))
    assert [d.entry_point for d in found.disabled] == ["lora"]


def test_a_component_is_disabled_by_its_own_name(site: Site) -> None:
    site.plugin("two", more=")\nOTHER = Component('other_one', '', 'torchweld_two.impl:make'")

    found = stock(TORCHWELD_DISABLE="two,ddp")

    assert not found.named("surgery", "two")
    assert not found.named("strategy", "ddp")
    assert found.notices == ()


def test_an_unknown_name_in_the_kill_switch_is_a_warning_with_a_suggestion(site: Site) -> None:
    site.plugin("lora")
    registry = Registry.installed({"TORCHWELD_DISABLE": "lroa"})

    plan = make_plan(registry, strategy="single", data="torch")

    (warning,) = plan.problems
    assert warning.severity == "warning"
    assert "'lroa'" in warning.what
    assert warning.fix == "did you mean 'lora'?"


def test_a_disabled_name_that_is_selected_says_so(site: Site) -> None:
    site.plugin("lora")
    registry = Registry.installed({"TORCHWELD_DISABLE": "lora"})

    _, problems = registry.choose("lora", "surgery")

    assert [(p.code, p.why) for p in problems] == [("TW101", "TORCHWELD_DISABLE names it")]


def test_autoload_off_leaves_only_built_ins(site: Site) -> None:
    BREAKAGES["raises"](site)
    site.plugin("lora")

    found = stock(TORCHWELD_AUTOLOAD="0", TORCHWELD_DISABLE="lora,ddp")

    names = [item.component.name for item in found.offered]
    assert names == ["torch", "single"]
    assert found.broken == ()
    assert found.notices == ()


def test_order_is_by_distribution_and_entry_point(site: Site) -> None:
    for name in ("zeta", "alpha", "mid"):
        site.plugin(name)

    names = [f.entry_point for f in discover({}).found if f.location == str(site.path)]

    assert names == ["alpha", "mid", "zeta"]


def test_the_copy_that_comes_first_on_the_path_wins(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.plugin("lora", version="2.0")
    before = Site(tmp_path / "before")
    before.plugin("lora", version="1.0", distribution="Torchweld_LoRA")
    monkeypatch.syspath_prepend(str(before.path))

    found = discover({})

    assert [f.version for f in found.found if f.entry_point == "lora"] == ["1.0"]
    assert [f.version for f in found.shadowed if f.entry_point == "lora"] == ["2.0"]


def test_of_two_versions_in_one_directory_the_newer_counts(site: Site) -> None:
    for version in ("1.10", "1.9"):
        site.plugin("lora", version=version)

    found = discover({})

    assert [f.version for f in found.found if f.entry_point == "lora"] == ["1.10"]


def test_a_directory_twice_on_the_path_is_no_duplicate(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.plugin("lora")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site.path)])

    found = discover({})

    assert [f.entry_point for f in found.found if f.location == str(site.path)] == ["lora"]
    assert found.shadowed == ()


def test_a_plugin_outside_site_packages_is_marked(site: Site) -> None:
    from torchweld.cli.screens import plugins_text

    site.plugin("lora")

    assert f"outside site-packages: {site.path}" in plugins_text(stock())


def test_what_a_plugin_prints_while_imported_stays_out_of_stdout(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.plugin("loud", source="print('hello')\nraise OSError")

    stock()

    assert capsys.readouterr().out == ""


def test_metadata_is_read_only_of_distributions_with_our_group(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install_unrelated(100)
    site.plugin("lora")
    reads: list[str] = []
    read_text = importlib_metadata.PathDistribution.read_text

    def counting(self: importlib_metadata.PathDistribution, filename: str) -> str | None:
        if Path(str(self.locate_file(""))) == site.path:
            reads.append(filename)
        return read_text(self, filename)

    monkeypatch.setattr(importlib_metadata.PathDistribution, "read_text", counting)
    discover({})

    assert reads.count("entry_points.txt") == 101
    assert reads.count("METADATA") == 1


def test_a_finder_that_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        @staticmethod
        def find_distributions(context: object) -> list[object]:
            raise OSError("network drive is gone")

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])

    assert any("network drive is gone" in broken.error for broken in discover({}).broken)


@pytest.fixture(scope="session")
def importlib_metadata_8_9(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version that mosaicml brings, in a directory of its own."""
    target = tmp_path_factory.mktemp("importlib_metadata")
    arguments = ["install", "-q", "--disable-pip-version-check", "--target", str(target)]
    command = [sys.executable, "-m", "pip", *arguments, "importlib_metadata==8.9.0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"importlib_metadata 8.9.0 cannot be had: {done.stderr.strip()[-200:]}")
    return target


def test_discovery_survives_importlib_metadata_8_9(
    site: Site, importlib_metadata_8_9: Path
) -> None:
    break_everything(site)
    site.plugin("healthy")
    program = (
        "import importlib_metadata\n"
        "assert importlib_metadata.version('importlib_metadata') == '8.9.0'\n"
        "try:\n"
        "    importlib_metadata.entry_points()\n"
        "except ValueError:\n"
        "    print('entry_points raises')\n"
        "from torchweld.registry import Registry\n"
        "registry = Registry.installed({})\n"
        "print([o.component.name for o in registry.components('surgery')])\n"
        "print(len(registry.broken))\n"
    )

    inherited = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join([str(importlib_metadata_8_9), str(site.path), inherited])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )

    raises, names, broken = done.stdout.splitlines()
    assert raises == "entry_points raises"
    assert "'healthy'" in names
    assert int(broken) == len(stock().broken)
