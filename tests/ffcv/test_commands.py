from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.ffcv.writing import frames, pairs, photo_folder, stored
from torchweld.cli import main
from torchweld_ffcv import convert
from torchweld_ffcv.beton import read_beton
from torchweld_ffcv.layout import PAGE_BYTES


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["ffcv", *map(str, words)])


def test_convert_writes_a_folder(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 9)
    target = tmp_path / "out.beton"

    result = run("convert", folder, target, "--workers", 2)

    assert result.exit_code == 0, result.output
    assert f"{target}: 9 samples, " in result.output
    assert stored(read_beton(target), "image", 0) == (folder / "cat" / "000.jpg").read_bytes()


def test_convert_changes_pictures_when_asked(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 3)
    target = tmp_path / "out.beton"

    run("convert", folder, target, "--store", "raw", "--max-side", 40)

    assert frames(read_beton(target)) == [(1, 40, 30)] * 3


def test_convert_takes_a_dataset_of_the_users_own_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from tests.ffcv.writing import pairs\nmade = pairs(5)\ndef make():\n    return pairs(6)\n"
    )
    script = "from torchweld.cli import main; main()"
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, "ffcv", "convert"]

    for word in ("mine:made", "mine:make"):
        subprocess.run([*command, word, f"{word[5:]}.beton"], cwd=tmp_path, env=environ, check=True)

    assert read_beton(tmp_path / "made.beton").num_samples == 5
    assert read_beton(tmp_path / "make.beton").num_samples == 6


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere", "the dataset 'nowhere' does not exist; give a folder"),
        ("no_such_module:data", "the module cannot be imported: ModuleNotFoundError"),
        ("tests.ffcv.writing:nothing", "tests.ffcv.writing has no 'nothing'"),
        ("tests.ffcv.writing:ROOT", "has no images in class folders"),
        ("tests.ffcv.writing:read_stock", "calling it failed: TypeError"),
    ],
)
def test_convert_says_what_is_wrong_with_the_source(tmp_path: Path, source: str, says: str) -> None:
    result = run("convert", source, tmp_path / "out.beton")

    assert result.exit_code == 1
    assert says in result.output
    assert list(tmp_path.iterdir()) == []


def test_convert_lists_what_was_left_out(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 4)
    (folder / "dog" / "001.jpg").write_bytes(b"no picture")
    target = tmp_path / "out.beton"

    refused = run("convert", folder, target)
    result = run("convert", folder, target, "--skip-bad")

    assert refused.exit_code == 1
    assert "sample 2 of 4" in refused.output
    assert "001.jpg" in refused.output
    assert result.exit_code == 0
    assert "left out sample 2" in result.output
    assert "3 samples, 1 left out" in result.output


def test_inspect_shows_fields_and_where_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "out.beton"
    convert(pairs(12), path)

    result = run("inspect", path)

    assert result.exit_code == 0
    assert f"{path}   12 samples" in result.output
    assert "written by torchweld-ffcv" in result.output
    assert "image   image   uint8" in result.output
    assert "label   int   int64" in result.output
    assert result.output.endswith("header and tables sound\n")


def test_inspect_gives_data(tmp_path: Path) -> None:
    path = tmp_path / "out.beton"
    convert([{"größe": 1.5}] * 3, path)

    report = json.loads(run("inspect", path, "--json", "--full").output)

    assert (report["num_samples"], report["checked"]) == (3, "every byte")
    assert report["fields"][0]["name"] == "größe"


def test_inspect_full_finds_what_the_tables_do_not_show(tmp_path: Path) -> None:
    path = tmp_path / "out.beton"
    convert(pairs(12), path)
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES + 100)
        file.write(b"x!")

    plain, full = run("inspect", path), run("inspect", path, "--full")
    data = run("inspect", path, "--full", "--json")

    assert plain.exit_code == 0
    assert full.exit_code == data.exit_code == 1
    assert "are not those that were written" in full.output
    assert "is damaged" in json.loads(data.output)["damage"]


@pytest.mark.parametrize("full", [(), ("--full",)])
def test_inspect_of_no_beton_file_is_one_sentence(tmp_path: Path, full: tuple[str, ...]) -> None:
    (tmp_path / "notes.txt").write_text("these are notes, and no dataset at all")

    result = run("inspect", tmp_path / "notes.txt", *full)

    assert result.exit_code == 1
    assert "is no .beton file: it begins with b'these ar'" in result.output
    assert "Traceback" not in result.output


def test_commands_are_listed_without_heavy_imports() -> None:
    script = """
import sys
import torchweld_ffcv
torchweld_ffcv.torchweld_commands()
torchweld_ffcv.torchweld_data_sources()
print(sorted({"numpy", "torch", "numba", "ffcv", "cv2", "PIL"} & set(sys.modules)))
"""

    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )

    assert done.stdout == "[]\n"
