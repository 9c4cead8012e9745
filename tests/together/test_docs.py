"""Every Python block of the documentation runs; the examples have tests of their own.

An HTML comment in front of a block says more about it:
``<!-- continue -->`` runs it after the block before it, in one script;
``<!-- file: path -->`` writes it for the blocks that follow;
``<!-- needs: module -->`` skips it where that module is not installed;
``<!-- skip: reason -->`` leaves it out;
``<!-- pair: name -->`` leaves it to test_coming_from.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.core.forked_scripts import run_script

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    ROOT / "core" / "README.md",
    *sorted(ROOT.glob("plugins/*/README.md")),
]
BLOCK = re.compile(
    r"^(?:<!-- (?P<word>\w+)(?:: (?P<value>[^>]+))? -->\n)?"
    r"```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Script:
    """Blocks that run as one program, and the files it may import."""

    name: str
    code: str
    files: dict[str, str] = field(default_factory=dict)
    needs: str = ""


def scripts_of(page: Path) -> list[Script]:
    scripts: list[Script] = []
    files: dict[str, str] = {}
    text = page.read_text("utf-8")
    for block in BLOCK.finditer(text):
        word, value, code = block["word"], block["value"], block["code"]
        line = text.count("\n", 0, block.start()) + 1
        if word == "file":
            files = {**files, value: code}
        elif block["language"] != "python" or word in {"skip", "pair"}:
            continue
        elif word == "continue":
            scripts[-1].code += code
        else:
            name = f"{page.relative_to(ROOT)}:{line}"
            scripts.append(Script(name, code, files, value if word == "needs" else ""))
    return scripts


SCRIPTS = [script for page in PAGES for script in scripts_of(page)]


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder``, whose modules it can import."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def test_blocks_are_found_with_their_files_and_joined(tmp_path: Path) -> None:
    fence = "```"
    page = tmp_path / "page.md"
    page.write_text(
        f"<!-- file: a.py -->\n{fence}python\nx = 1\n{fence}\n{fence}python\nimport a\n{fence}\n"
        f"{fence}console\n$ ls\n{fence}\n<!-- continue -->\n{fence}python\nprint(a.x)\n{fence}\n"
    )

    blocks = [(block["word"], block["language"]) for block in BLOCK.finditer(page.read_text())]

    assert blocks == [
        ("file", "python"),
        (None, "python"),
        (None, "console"),
        ("continue", "python"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_of_the_documentation_runs(script: Script, tmp_path: Path) -> None:
    if script.needs and not find_spec(script.needs):
        pytest.skip(f"needs {script.needs}")
    write_files(tmp_path, {**script.files, "script.py": script.code})

    run_script(tmp_path / "script.py")


@pytest.fixture(params=[ROOT / "docs" / "contracts.md"], ids=["contracts.md"])
def published_plugin(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of the page's plugin, laid out as if it were installed."""
    files: dict[str, str] = {}
    for block in BLOCK.finditer(request.param.read_text("utf-8")):
        if block["word"] == "file":
            files[block["value"]] = block["code"]
    entry_points = files["pyproject.toml"].partition("[project.entry-points.torchweld]\n")[2]
    info = "torchweld_lookahead-0.1.dist-info"
    files[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: torchweld-lookahead\nVersion: 0.1\n"
    files[f"{info}/entry_points.txt"] = "[torchweld]\n" + entry_points.replace('"', "")
    write_files(tmp_path, files)
    return tmp_path


@pytest.mark.slow
def test_plugin_of_the_documentation_is_listed_and_planned(published_plugin: Path) -> None:
    torchweld = ["-c", "from torchweld.cli import main; main()"]
    plan = [*torchweld, "plan", "strategy=single", "surgery=lookahead"]

    listed = run(*torchweld, "plugins", folder=published_plugin).stdout
    planned = run(*plan, folder=published_plugin).stdout

    assert "torchweld-lookahead 0.1" in listed
    assert "lookahead" in planned


@pytest.mark.slow
def test_plugin_of_the_documentation_passes_its_conformance_tests(published_plugin: Path) -> None:
    done = run("-m", "pytest", "-q", "test_lookahead.py", folder=published_plugin)

    assert " passed" in done.stdout


def test_listing_module_in_the_readme_is_the_one_of_the_contracts_page() -> None:
    def listing(page: Path) -> str:
        blocks = [b["code"] for b in BLOCK.finditer(page.read_text("utf-8")) if b["word"] == "file"]
        return blocks[0].partition("@dataclass")[2].partition("@hookimpl")[0]

    assert listing(ROOT / "README.md") == listing(ROOT / "docs" / "contracts.md")
