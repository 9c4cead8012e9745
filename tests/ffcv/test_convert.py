from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from tests.ffcv.writing import (
    frames,
    leftovers,
    pairs,
    photo_folder,
    picture,
    read_stock,
    skipped,
    start_script,
    stored,
)
from torchweld.errors import InvalidArgument
from torchweld_ffcv import convert
from torchweld_ffcv.beton import read_beton, verify
from torchweld_ffcv.errors import ConversionError


class Faulty(Dataset[Any]):
    """400 samples, one of which does something else."""

    def __init__(self, act: Any, at: int = 150) -> None:
        self.act, self.at = act, at

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Any:
        if index == self.at:
            self.act()
        return torch.full((3, 4, 5), index % 256, dtype=torch.uint8), index


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


def raise_os_error() -> None:
    raise OSError("cannot identify image file 'x.JPEG'")


# ---- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 300])
@pytest.mark.parametrize("workers", [1, 2])
def test_stock_ffcv_reads_the_same_pixels_and_labels(
    tmp_path: Path, count: int, workers: int
) -> None:
    samples = pairs(count)

    done = convert(samples, tmp_path / "out.beton", workers=workers)

    read = read_stock(tmp_path / "out.beton")
    verify(read_beton(tmp_path / "out.beton"))
    assert done.num_samples == len(read) == count
    assert [int(label) for _, label in read] == [label for _, label in samples]
    assert all(
        np.array_equal(ours.numpy(), theirs)
        for (ours, _), (theirs, _) in zip(read, samples, strict=True)
    )


@pytest.mark.parametrize("os_cache", [True, False])
def test_picture_larger_than_a_page_is_written_and_read(tmp_path: Path, os_cache: bool) -> None:
    large = np.resize(np.arange(251, dtype=np.uint8), (2000, 2000, 3))
    samples = [(picture(1, 2000, 2000), 0), (large, 1), (picture(2, 2000, 2000), 2)]

    convert(samples, tmp_path / "out.beton", workers=2)

    read = read_stock(tmp_path / "out.beton", os_cache=os_cache)
    assert read_beton(tmp_path / "out.beton").page_bytes == 16 << 20
    assert [int(label) for _, label in read] == [0, 1, 2]
    for (ours, _), (theirs, _) in zip(read, samples, strict=True):
        assert np.array_equal(ours.numpy(), theirs)


def test_small_and_large_values_mix(tmp_path: Path) -> None:
    sizes = [random.Random(3).choice([10, 3000, 400_000, 9_000_000]) for _ in range(30)]
    samples = [bytes([index]) * size for index, size in enumerate(sizes)]

    convert(samples, tmp_path / "out.beton", workers=2)

    beton = read_beton(tmp_path / "out.beton")
    verify(beton)
    table = beton.allocations()
    pages = [
        table["ptr"] // beton.page_bytes,
        (table["ptr"] + table["size"] - 1) // beton.page_bytes,
    ]
    assert [stored(beton, "input", index) for index in range(30)] == samples
    assert np.array_equal(*pages), "a value crosses a border of pages"


def test_jpeg_files_keep_their_bytes(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 21)

    done = convert(folder, tmp_path / "out.beton", workers=2)

    beton = read_beton(done.path)
    files = sorted(folder.glob("*/*.jpg"))
    assert [stored(beton, "image", index) for index in range(21)] == [
        file.read_bytes() for file in files
    ]
    assert beton.metadata["f1"].tolist() == [0] * 11 + [1] * 10
    assert set(frames(beton)) == {(0, 80, 60)}


def test_kept_jpeg_files_are_pictures_to_stock_ffcv(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 4)

    convert(folder, tmp_path / "out.beton")

    read = read_stock(tmp_path / "out.beton")
    for (pixels, _), file in zip(read, sorted(folder.glob("*/*.jpg")), strict=True):
        exact = np.asarray(Image.open(file)).astype(int)
        assert abs(pixels.numpy() - exact).max() <= 8  # ffcv decodes with the fast DCT


def test_folder_has_the_order_and_labels_of_torchvision(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    folder = photo_folder(tmp_path / "photos", 11)
    (folder / "dog" / "more").mkdir()
    (folder / "dog" / "notes.txt").write_text("no picture")
    Image.fromarray(picture(5)).save(folder / "dog" / "more" / "z.png")
    theirs = datasets.ImageFolder(folder)

    convert(folder, tmp_path / "folder.beton")
    convert(theirs, tmp_path / "dataset.beton")

    for name in ("folder.beton", "dataset.beton"):
        beton = read_beton(tmp_path / name)
        assert beton.metadata["f1"].tolist() == theirs.targets
        assert stored(beton, "image", 0) == Path(theirs.samples[0][0]).read_bytes()
        assert stored(beton, "image", 11) == np.asarray(theirs[11][0]).tobytes()


def test_subset_of_a_folder_keeps_its_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    folder = photo_folder(tmp_path / "photos", 8)
    subset = Subset(datasets.ImageFolder(folder, target_transform=lambda label: label + 5), [6, 1])

    convert(subset, tmp_path / "out.beton")

    beton = read_beton(tmp_path / "out.beton")
    file = Path(subset.dataset.samples[6][0])  # type: ignore[attr-defined]  # an ImageFolder
    assert stored(beton, "image", 0) == file.read_bytes()
    assert beton.metadata["f1"].tolist() == [6, 5]


def test_other_pictures_of_a_folder_become_pixels(tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "cat"
    folder.mkdir(parents=True)
    rgb = Image.fromarray(picture(3))
    rgb.convert("CMYK").save(folder / "a.jpg")
    rgb.convert("L").save(folder / "b.jpg")
    rgb.convert("P").save(folder / "c.png")
    rgb.save(folder / "d.jpeg", "PNG")  # a PNG under another name, as ImageNet has one

    convert(tmp_path / "photos", tmp_path / "out.beton")

    beton = read_beton(tmp_path / "out.beton")
    assert beton.metadata["f0"]["mode"].tolist() == [1, 0, 1, 1]
    assert stored(beton, "image", 1) == (folder / "b.jpg").read_bytes()
    assert stored(beton, "image", 3) == picture(3).tobytes()


def test_iterable_of_unknown_length_is_written_in_order(tmp_path: Path) -> None:
    samples = pairs(150)

    convert(Stream(samples), tmp_path / "out.beton", workers=2)

    read = read_stock(tmp_path / "out.beton")
    assert [int(label) for _, label in read] == list(range(150))
    assert np.array_equal(read[149][0].numpy(), samples[149][0])


def test_metadata_that_outgrows_its_place_moves_the_pages(tmp_path: Path) -> None:
    # 60 numbers a sample: the rows of 19,000 samples need more than the page left for them.
    numbers = {f"n{index}": index for index in range(58)}
    samples = (
        {"data": index.to_bytes(4, "big"), "at": index, **numbers} for index in range(19_000)
    )

    convert(samples, tmp_path / "out.beton", workers=2)

    beton = read_beton(tmp_path / "out.beton")
    verify(beton)
    assert beton.metadata["f1"].tolist() == list(range(19_000))
    for index in (0, 9_000, 18_999):
        assert stored(beton, "data", index) == index.to_bytes(4, "big")


def test_dataset_of_a_dataloader_is_taken(tmp_path: Path) -> None:
    dataset = TensorDataset(torch.arange(60.0).reshape(20, 3), torch.arange(20))

    convert(DataLoader(dataset, batch_size=4, shuffle=True), tmp_path / "out.beton")

    read = read_stock(tmp_path / "out.beton")
    assert torch.equal(torch.stack([inputs for inputs, _ in read]), dataset.tensors[0])
    assert [int(target) for _, target in read] == list(range(20))


def test_bad_samples_are_left_out_and_listed_when_asked(tmp_path: Path) -> None:
    samples: list[Any] = pairs(100)
    samples[3], samples[70] = (samples[3][0], None), ("no picture", 70)

    done = convert(samples, tmp_path / "out.beton", skip_bad=True, workers=2)

    read = read_stock(tmp_path / "out.beton")
    assert [int(label) for _, label in read] == [i for i in range(100) if i not in {3, 70}]
    assert skipped(done.path) == [3, 70]
    assert "its field 'label' is None" in done.skipped[0][1]


# ---- what fails, and leaves nothing ------------------------------------------------------------


def test_sample_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as caught:
        convert(Faulty(raise_os_error), tmp_path / "out.beton", workers=2)

    assert "sample 150 of 400 could not be written" in str(caught.value)
    assert "OSError: cannot identify image file 'x.JPEG'" in str(caught.value)
    assert "raise_os_error" in str(caught.value.__cause__)  # the worker's traceback
    assert list(tmp_path.iterdir()) == []


def test_first_sample_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="sample 3 of 400 cannot be read: OSError"):
        convert(Faulty(raise_os_error, at=3), tmp_path / "out.beton")


def test_sample_of_an_iterable_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    def samples() -> Iterator[Any]:
        yield from pairs(40)
        raise_os_error()

    with pytest.raises(ConversionError, match="sample 40 cannot be read: OSError"):
        convert(samples(), tmp_path / "out.beton")

    assert list(tmp_path.iterdir()) == []


def test_damaged_file_of_a_folder_is_named(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "photos", 40)
    victim = folder / "dog" / "035.jpg"
    victim.write_bytes(victim.read_bytes()[:400])

    with pytest.raises(ConversionError, match=r"sample 37 of 40 .*035\.jpg.*PIL cannot read"):
        convert(folder, tmp_path / "out.beton")


def test_worker_that_dies_ends_the_conversion(tmp_path: Path) -> None:
    dataset = Faulty(lambda: os.kill(os.getpid(), signal.SIGKILL))

    with pytest.raises(ConversionError, match=r"ended by SIGKILL at samples 1.. to 1.*memory"):
        convert(dataset, tmp_path / "out.beton", workers=2)

    assert list(tmp_path.iterdir()) == []


def test_worker_that_leaves_is_an_error_of_its_sample(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"sample 150 .*SystemExit: 3"):
        convert(Faulty(lambda: sys.exit(3)), tmp_path / "out.beton", workers=2)


def test_older_file_survives_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "out.beton"
    convert(pairs(5), path)
    before = path.read_bytes()

    with pytest.raises(ConversionError, match="the older file is as it was"):
        convert(Faulty(raise_os_error), path, workers=2)

    assert path.read_bytes() == before
    assert leftovers(tmp_path) == []


def test_open_readers_keep_the_file_that_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.beton"
    convert(pairs(5), path)
    mapped = np.memmap(path, mode="r")
    before = mapped.tobytes()

    convert(pairs(3), path)

    assert mapped.tobytes() == before  # written in place, this would be SIGBUS
    assert read_beton(path).num_samples == 3


def test_no_room_for_the_file_is_one_error(tmp_path: Path) -> None:
    script = """
import sys, resource
from tests.ffcv.writing import picture
from torchweld_ffcv import convert
from torchweld_ffcv.errors import ConversionError
resource.setrlimit(resource.RLIMIT_FSIZE, (30 << 20, 30 << 20))
try:
    convert([picture(0, 1000, 1000)] * 40, sys.argv[1], workers=2)
except ConversionError as error:
    print(error)
"""
    process = start_script(script, str(tmp_path / "out.beton"))

    output, errors = process.communicate(timeout=240)

    assert "File too large after" in output, errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_is_one_error(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        with pytest.raises(ConversionError, match="No space left on device"):
            convert([picture(0, 1000, 1000)] * 40, small / "out.beton", workers=2)
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "is empty: there is nothing to convert"),
        ({}, "is no dataset"),
        (3, "has neither __getitem__ and __len__ nor __iter__"),
        (iter([]), "is empty"),
        ("nowhere", "'nowhere' does not exist; give a folder"),
    ],
)
def test_what_is_no_dataset_is_refused(tmp_path: Path, given: Any, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        convert(given, tmp_path / "out.beton")

    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)

    with pytest.raises(InvalidArgument, match=r"has no images .* expected .*CLASS/image\.jpg"):
        convert(tmp_path / "photos", tmp_path / "out.beton")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("missing/out.beton", "the folder .*missing' does not exist; make it with: mkdir -p"),
        ("", "is a directory; name a file in it"),
    ],
)
def test_place_that_cannot_be_written_is_refused(tmp_path: Path, place: str, says: str) -> None:
    with pytest.raises(ConversionError, match=says):
        convert(pairs(3), tmp_path / place)


def test_file_system_that_takes_no_files_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"/proc/out.beton cannot be written"):
        convert(pairs(3), "/proc/out.beton")


def test_random_samples_are_refused_unless_wanted(tmp_path: Path) -> None:
    class Noise(Faulty):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(3), index

    with pytest.raises(ConversionError, match=r"another one each time it is read.*allow_random"):
        convert(Noise(None), tmp_path / "out.beton")
    assert convert(Noise(None), tmp_path / "out.beton", allow_random=True).num_samples == 400


def test_random_stream_is_refused(tmp_path: Path) -> None:
    class Shuffled(Stream):
        def __iter__(self) -> Iterator[Any]:
            return iter(random.sample(self.samples, len(self.samples)))

    with pytest.raises(ConversionError, match="the Shuffled is another one each time it is read"):
        convert(Shuffled(pairs(40)), tmp_path / "out.beton")


def test_random_state_is_left_alone(tmp_path: Path) -> None:
    class Drawing(Faulty):
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(3) + 0 * torch.rand(1), index + 0 * random.randrange(9)

    torch.manual_seed(1)
    random.seed(1)
    convert(Drawing(None), tmp_path / "out.beton")
    drawn = (float(torch.rand(1)), random.random())

    torch.manual_seed(1)
    random.seed(1)
    assert drawn == (float(torch.rand(1)), random.random())


def test_no_file_is_left_open(tmp_path: Path) -> None:
    convert(pairs(3), tmp_path / "out.beton")  # imports and first use
    files = len(list(Path("/proc/self/fd").iterdir()))

    convert(pairs(300), tmp_path / "out.beton", workers=2)
    with pytest.raises(ConversionError):
        convert(Faulty(raise_os_error), tmp_path / "out.beton", workers=2)

    assert len(list(Path("/proc/self/fd").iterdir())) <= files  # other tests close theirs late


def test_workers_stay_within_the_cores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convert(pairs(3), tmp_path / "out.beton", workers=1000)

    assert "1000 workers asked, this process may use" in caplog.text


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    script = """
import sys, resource
import numpy as np
from torchweld_ffcv import convert
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
def pictures(count):
    return (np.full((600, 600, 3), index % 256, np.uint8) for index in range(count))  # 1 MiB each
convert(pictures(20), sys.argv[1], workers=2)
before = peak()
convert(pictures(300), sys.argv[1], workers=2)
print(peak() - before)
"""
    process = start_script(script, str(tmp_path / "out.beton"))

    output, errors = process.communicate(timeout=240)

    assert int(output) < 150, errors  # MiB; 309 MiB of pictures went through
