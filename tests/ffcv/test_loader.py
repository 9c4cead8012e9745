"""The loader of one split as a drop-in for a DataLoader."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.ffcv.reading import ROOT, labels, load, photo, photos, pictures, write
from torchweld.components import use
from torchweld.errors import InvalidArgument, RunError
from torchweld.planning import make_plan
from torchweld.registry import Registry
from torchweld_ffcv import image
from torchweld_ffcv.beton import read_beton
from torchweld_ffcv.errors import BetonError, ConversionError
from torchweld_ffcv.kinds import Bytes, Json
from torchweld_ffcv.memory import Recycler

CROP = {"image": image(crop="random_resized", size=16, flip=0.5)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 raw pictures of one size."""
    return write(tmp_path_factory.mktemp("small") / "small.beton", pictures(37))


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 JPEG photos of several sizes."""
    return write(tmp_path_factory.mktemp("jpegs") / "jpegs.beton", photos(20), store="jpeg")


# ---- which samples, and how many batches ---------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 9, 201])
def test_every_label_comes_once_whatever_the_options(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "few.beton", pictures(count, 2, 2))

    for shuffle in (False, True):
        whole = load(path, batch_size=8, shuffle=shuffle)
        cut = load(path, batch_size=8, shuffle=shuffle, drop_last=True)
        assert sorted(labels(whole)) == list(range(count))
        assert len(whole) == whole.num_batches == len(list(whole))
        found = labels(cut)
        assert len(found) == len(set(found)) == cut.num_samples == 8 * (count // 8)


def test_labels_are_int64_of_shape_batch_also_for_a_last_batch_of_one(small: Path) -> None:
    batches = list(load(small, batch_size=36))

    assert [(b[1].dtype, tuple(b[1].shape)) for b in batches] == [
        (torch.int64, (36,)),
        (torch.int64, (1,)),
    ]


def test_the_contract_says_what_comes(jpegs: Path) -> None:
    loader = load(jpegs, batch_size=4, spec=CROP)

    images, _ = next(iter(loader))

    assert str(loader.contract) == (
        "tuple of image (batch, 3, 16, 16) float32 in [0, 1], label (batch,) int64"
    )
    assert tuple(images.shape) == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) < float(images.max()) <= 1


def test_mapping_samples_give_mapping_batches_in_their_order(tmp_path: Path) -> None:
    samples = [{"x": torch.full((2,), float(i)), "y": i, "w": 0.5} for i in range(5)]

    batch = next(iter(load(samples, batch_size=5, shuffle=False, cache_dir=str(tmp_path))))

    expected = next(iter(DataLoader(samples, batch_size=5)))  # type: ignore[arg-type]  # a list
    assert list(batch) == list(expected) == ["x", "y", "w"]
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert [v.dtype for v in batch.values()] == [v.dtype for v in expected.values()]


def test_bare_samples_give_bare_batches(tmp_path: Path) -> None:
    samples = [torch.full((2, 3), float(i)) for i in range(5)]

    batch = next(iter(load(samples, batch_size=5, shuffle=False, cache_dir=str(tmp_path))))

    assert torch.equal(batch, torch.stack(samples))


def test_what_has_no_fixed_size_comes_as_lists(tmp_path: Path) -> None:
    samples = [("word " * i, b"abc"[:i]) for i in range(1, 4)]
    fields = {"text": Json(), "raw": Bytes()}

    text, raw = next(
        iter(load(samples, batch_size=3, shuffle=False, fields=fields, cache_dir=str(tmp_path)))
    )

    assert text == ["word ", "word word ", "word word word "]
    assert [bytes(item.tolist()) for item in raw] == [b"a", b"ab", b"abc"]


def test_a_dataloader_keeps_its_batch_size_order_and_drop_last(tmp_path: Path) -> None:
    given: Any = DataLoader(pictures(10), batch_size=4, drop_last=True)  # type: ignore[arg-type]

    loader = load(given, batch_size=7, cache_dir=str(tmp_path))

    assert [b[1].tolist() for b in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]


# ---- whose memory it is --------------------------------------------------------------------------


def test_batches_that_are_kept_keep_their_contents(small: Path) -> None:
    loader = load(small, batch_size=4, num_workers=2)

    kept, copies = [], []
    for images, targets in loader:
        kept.append((images, targets))
        copies.append((images.clone(), targets.clone()))

    assert len(kept) == 10
    for ours, copied in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, copied, strict=True))


def test_memory_is_used_again_only_when_nothing_refers_to_it() -> None:
    memory = Recycler(most=2)

    tensor = torch.from_numpy(memory.take((4, 4), np.dtype(np.float32)))
    place, view = tensor.data_ptr(), tensor[1:].view(-1)
    del tensor
    while_viewed = memory.take((4, 4), np.dtype(np.float32)).ctypes.data
    del view
    afterwards = memory.take((4, 4), np.dtype(np.float32))

    assert while_viewed != place
    assert afterwards.ctypes.data in {place, while_viewed}


def test_a_loop_that_drops_its_batches_reads_into_the_same_memory(small: Path) -> None:
    loader = load(small, batch_size=4, batches_ahead=1, num_workers=1)

    places = {images.data_ptr() for epoch in range(5) for images, _ in loader}

    assert len(places) <= 4


# ---- beside the rest of the process --------------------------------------------------------------


def test_the_number_of_torch_threads_is_left_alone(jpegs: Path) -> None:
    before = torch.get_num_threads()

    loader = load(jpegs, batch_size=4, num_workers=1, spec=CROP)
    during = [torch.get_num_threads() for _ in loader]
    loader.close()

    assert {*during, torch.get_num_threads()} == {before}


LEAVE_EARLY = """
import gc, sys, threading
from pathlib import Path
from tests.ffcv.reading import load
from torchweld_ffcv import image
def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
loader = load(sys.argv[1], batch_size=4, spec={"image": image(crop="random_resized", size=64)})
counts = []
for epoch in range(110):
    loader.set_epoch(epoch)
    for batch in loader:
        break
    if epoch in (9, 109):
        counts.append((threading.active_count(), rss()))
(threads, before), (later, after) = counts
print(later - threads, abs(after - before) < 50e6)
"""


def run_python(code: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that can import the tests."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "OMP_NUM_THREADS": "1",
        **environ,
    }
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_a_hundred_epochs_left_early_leave_nothing_and_the_process_ends_well(jpegs: Path) -> None:
    done = run_python(LEAVE_EARLY, str(jpegs))

    assert (done.stdout.split(), done.returncode) == (["0", "True"], 0), done.stderr


BESIDE_STOCK = """
import sys
import numba
import numpy as np
from numba.core.errors import TypingError

path, first = sys.argv[1:]

@numba.njit
def empty(size):
    return np.empty(size, np.uint8)

def is_writable():
    @numba.njit  # a new one, as numba remembers what could not be compiled
    def black(size):
        pixels = np.empty(size, np.uint8)
        pixels[:] = 0
        return pixels

    try:
        return black(1).sum() == 0
    except TypingError as error:
        assert "Cannot modify readonly array" in str(error)
        return False

def theirs():
    from ffcv.loader import Loader  # not before it is asked for
    loader = Loader(path, batch_size=2, num_workers=1, drop_last=False)
    return [images.clone() for images, _ in loader]

def ours(**spec):
    from tests.ffcv.reading import load
    from torchweld_ffcv import image
    loader = load(path, batch_size=2, shuffle=False, spec={"image": image(**spec)})
    return [images.permute(0, 2, 3, 1).clone() for images, _ in loader]

def pipelines():
    from tests.ffcv.reading import load
    load(path, batch_size=2, pipelines={"image": None})

def are_equal(left, right):
    return all(map(np.array_equal, left, right)) and len(left) == len(right) == 2

empty(1)
{"ours": ours, "theirs": theirs, "pipelines": pipelines}[first]()
before = theirs()
print(is_writable())
print(are_equal(ours(normalize=None), before), are_equal(theirs(), before))
ours(crop="random_resized", size=16)
print(is_writable())
"""


# Where the first is False, it is the control: FFCV's loader has broken what is compiled after it.
# What it has broken before this plugin is imported stays so, but for this plugin.
@pytest.mark.parametrize(
    ("store", "first", "writable"),
    [
        ("raw", "ours", (False, True)),
        ("jpeg", "ours", (False, True)),
        ("jpeg", "theirs", (False, False)),
        ("jpeg", "pipelines", (True, True)),
    ],
)
def test_images_are_compiled_beside_ffcvs_own_loader(
    tmp_path: Path, store: str, first: str, writable: tuple[bool, bool]
) -> None:
    path = write(tmp_path / "some.beton", [(photo(i), i) for i in range(3)], store=store)

    # Nothing is compiled yet.
    done = run_python(BESIDE_STOCK, str(path), first, XDG_CACHE_HOME=str(tmp_path))

    before, after = map(str, writable)
    assert done.stdout.split() == [before, "True", "True", after], done.stderr


NEVER_FINISHED = """
import sys
from tests.ffcv.reading import load
from torchweld_ffcv import image
kept = iter(load(sys.argv[1], batch_size=1, spec={"image": image(crop="center", size=8)}))
next(kept)
"""


def test_an_iterator_that_is_never_finished_does_not_keep_the_process(jpegs: Path) -> None:
    done = run_python(NEVER_FINISHED, str(jpegs))

    assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr


def test_close_ends_the_threads(jpegs: Path) -> None:
    before = set(threading.enumerate())

    loader = load(jpegs, batch_size=4, spec=CROP, num_workers=2)
    next(iter(loader))
    loader.close()
    loader.close()

    assert set(threading.enumerate()) <= before  # other loaders' may end meanwhile
    assert len(labels(loader)) == 20  # and it may be read again


def test_a_loader_works_in_a_forked_child(jpegs: Path) -> None:
    loader = load(jpegs, batch_size=4, spec=CROP)
    expected = sorted(labels(loader))

    child = os.fork()
    if child == 0:  # threads stay in the parent, so the loader needs new ones here
        os._exit(0 if sorted(labels(loader)) == expected else 1)

    assert os.waitpid(child, 0)[1] == 0


def test_training_and_validation_can_alternate(small: Path, jpegs: Path) -> None:
    train, val = load(small, batch_size=4), load(jpegs, batch_size=2, spec=CROP, train=False)

    pairs = list(zip(train, val, strict=True))

    assert sorted(labels(pair[0] for pair in pairs)) == list(range(37))
    assert labels(pair[1] for pair in pairs) == list(range(20))


# ---- what goes wrong -----------------------------------------------------------------------------


def test_a_damaged_jpeg_is_an_error_here_that_names_sample_and_field(tmp_path: Path) -> None:
    path = write(tmp_path / "damaged.beton", photos(12), store="jpeg")
    start = int(read_beton(path).metadata["f0"]["data_ptr"][7])
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\0" * 200)

    loader = load(path, batch_size=4, shuffle=False, spec=CROP)
    batches = iter(loader)
    next(batches)

    with pytest.raises(RunError, match=r"sample 7 of .*damaged.beton: the JPEG in field 'image'"):
        next(batches)
    loader.close()


def test_bad_samples_are_left_out_when_asked_and_counted(tmp_path: Path) -> None:
    samples = [*pictures(20), ("no picture", 20), *pictures(2)]
    options: dict[str, Any] = {"batch_size": 3, "shuffle": False, "cache_dir": str(tmp_path)}

    with pytest.raises(ConversionError, match="sample 20 of 23"):
        load(samples, **options)
    loader = load(samples, skip_bad=True, **options)

    assert labels(loader) == [*range(20), 0, 1]
    assert "left out 1 bad samples" in loader.note


def test_a_pointer_that_the_table_does_not_know_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "damaged.beton", pictures(5))
    beton = read_beton(path)
    place = beton.metadata_offset + 3 * beton.metadata_dtype.itemsize
    with path.open("r+b") as file:
        row = beton.metadata[3:4].copy()
        row["f0"]["data_ptr"] += 1
        file.seek(place)
        file.write(row.tobytes())

    with pytest.raises(BetonError, match="samples lie where its table has nothing"):
        list(load(path, batch_size=5))


def test_images_of_several_sizes_need_one(jpegs: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"from 40 to 60 rows.*choose one size"):
        load(jpegs, batch_size=4)


def test_a_field_that_does_not_exist_is_named_with_those_that_do(small: Path) -> None:
    with pytest.raises(InvalidArgument, match="no field 'imgae': its fields are 'image', 'label'"):
        load(small, batch_size=4, spec={"imgae": image()})


def test_a_field_cannot_be_read_as_something_else(small: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"field 'label' .* holds int"):
        load(small, batch_size=4, spec={"label": image()})


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BetonError, match="torchweld ffcv convert"):
        load(str(tmp_path / "absent.beton"), batch_size=4)


def test_a_batch_size_is_asked_for(small: Path) -> None:
    with pytest.raises(InvalidArgument, match="batch_size="):
        load(small)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batches_ahead": 0}, "would write the next batch over the one in use"),
        ({"batch_size": 0}, "batch_size=0 is not an integer >= 1"),
        ({"num_workers": 0}, "num_workers=0 is not an integer >= 1"),
        ({"spec": {}, "pipelines": {}}, "keep one"),
        ({"spec": {"image": 224}}, "spec['image']=224 is none of"),
    ],
)
def test_options_that_cannot_work_are_a_problem_of_the_plan(
    options: dict[str, Any], words: str
) -> None:
    import torchweld_ffcv

    registry = Registry({"ffcv": torchweld_ffcv})

    plan = make_plan(registry, strategy="single", data=use("ffcv", **options))

    assert [p.code for p in plan.problems] == ["TW103"]
    assert words in f"{plan.problems[0].what} {plan.problems[0].why}"


def test_more_threads_than_cores_are_said_and_not_started(small: Path) -> None:
    loader = load(small, batch_size=4, num_workers=5000)

    assert "5000 workers asked, this process may use" in loader.note


# ---- orders --------------------------------------------------------------------------------------


def test_quasi_random_reads_every_sample_once_in_another_order_each_epoch(small: Path) -> None:
    loader = load(small, batch_size=4, order="quasi_random")

    first = labels(loader)
    loader.set_epoch(1)
    second = labels(loader)

    assert sorted(first) == sorted(second) == list(range(37))
    assert first != second != sorted(second)


def test_quasi_random_keeps_to_a_few_pages_at_a_time(tmp_path: Path) -> None:
    big = [(np.zeros((500, 700, 3), np.uint8), i) for i in range(64)]  # 1 MB each
    path = write(tmp_path / "pages.beton", big)
    beton = read_beton(path)
    pages = beton.metadata["f0"]["data_ptr"] // beton.page_bytes

    order = labels(load(path, batch_size=1, order="quasi_random"))

    near = [set(pages[order[i : i + 14]].tolist()) for i in range(0, 56, 14)]
    assert max(map(len, near)) <= 5 < len(set(pages.tolist()))


def test_quasi_random_on_several_ranks_is_refused_with_the_reason(small: Path) -> None:
    with pytest.raises(InvalidArgument, match="2 processes would each read every page"):
        load(small, batch_size=4, order="quasi_random", world_size=2)
