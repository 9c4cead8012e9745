"""What importing does to a process, and what is said where ffcv is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.ffcv.reading import ROOT, pictures, write

HEAVY = ("torch", "torchvision", "ffcv", "numba", "numpy", "cv2")


def run_python(code: str, *words: str, **more: str) -> str:
    """What a fresh interpreter prints."""
    path = os.pathsep.join([str(ROOT), *sys.path])  # this code, wherever it is imported from
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_listing_and_planning_import_nothing_heavy() -> None:
    code = f"""
import sys
import torchweld_ffcv as ffcv
from torchweld import use
from torchweld.planning import make_plan
from torchweld.registry import Registry
spec = {{"image": ffcv.image(crop="random_resized", size=224, normalize=ffcv.IMAGENET)}}
plan = make_plan(
    Registry({{"ffcv": ffcv}}), strategy="single", data=use("ffcv", batch_size=4, spec=spec)
)
plan.explain()
print(plan.problems, [name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run_python(code) == "() []"


READ = """
import sys
from tests.ffcv.reading import load
loader = load(sys.argv[1], batch_size=4)
count = sum(len(batch[1]) for batch in loader)
print(count, [name for name in ("ffcv", "cv2") if name in sys.modules])
"""


def test_reading_does_not_import_ffcv(tmp_path: Path) -> None:
    path = write(tmp_path / "small.beton", pictures(5))

    assert run_python(READ, str(path)) == "5 []"


def test_compiled_code_is_kept_for_the_next_process(tmp_path: Path) -> None:
    path = write(tmp_path / "small.beton", pictures(5))
    code = READ + "from torchweld_ffcv.pixels import read_images\n"
    code += "print(sum(read_images.stats.cache_hits.values()))\n"
    cache = {"XDG_CACHE_HOME": str(tmp_path)}

    first, second = (run_python(code, str(path), **cache) for _ in range(2))

    assert (first.split()[-1], second.split()[-1]) == ("0", "1")


def test_reading_works_where_no_cache_can_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "small.beton", pictures(5))

    assert run_python(READ, str(path), XDG_CACHE_HOME="/proc/nowhere") == "5 []"


WITHOUT_FFCV = """
import sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name == "ffcv" else found(name, *more)
from tests.ffcv.reading import load
from torchweld.errors import PluginError
for more in ({}, {"on_unsupported": "dataloader"}):
    try:
        load(sys.argv[1], batch_size=4, **more)
    except PluginError as error:
        print(error)
import numpy as np
pictures = [(np.zeros((4, 4, 3), np.uint8), i) for i in range(3)]
instead = load(pictures, batch_size=3, on_unsupported="dataloader", cache_dir=sys.argv[2])
print(sorted(next(iter(instead))[1].tolist()))
"""


def test_without_ffcv_one_sentence_says_what_to_install_and_a_dataloader_can_stand_in(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "small.beton", pictures(5))

    said, with_dataloader, *rest = run_python(WITHOUT_FFCV, str(path), str(tmp_path)).splitlines()

    assert "pip install 'torchweld-ffcv[ffcv]'" in said
    assert "'ffcv'" in said
    # Not a DataLoader over the letters of the path, which is what text would be taken for.
    assert with_dataloader.startswith(said)
    assert "on_unsupported='dataloader' cannot help, as a DataLoader reads no path" in (
        with_dataloader
    )
    assert rest == ["[0, 1, 2]"]
