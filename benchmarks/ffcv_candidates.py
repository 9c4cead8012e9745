"""What is measured by ``ffcv_loading.py``: the data, and everybody who reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WORKERS = 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCHES = {"jpeg": 64, "raw": 64, "small": 512, "first": 64, "even": 256, "large": 256}
MILLION = 1_281_167  # samples of ImageNet


# ---- data ----------------------------------------------------------------------------------------


def photos(count: int) -> Iterator[np.ndarray[Any, Any]]:
    """Parts of two photographs, around 400 x 500."""
    from sklearn.datasets import load_sample_images

    random, pictures = np.random.default_rng(0), load_sample_images().images
    for index in range(count):
        height, width = random.integers(380, 420), random.integers(480, 520)
        picture = pictures[index % 2]
        top = random.integers(0, picture.shape[0] - height + 1)
        left = random.integers(0, picture.shape[1] - width + 1)
        yield picture[top : top + height, left : left + width]


def make_data(directory: Path, count: int) -> None:
    """Write JPEG files in class folders, and the three .beton files."""
    from PIL import Image

    from torchweld_ffcv import convert
    from torchweld_ffcv.kinds import Image as Stored
    from torchweld_ffcv.kinds import Int

    for index, picture in enumerate(photos(count)):
        folder = directory / "folder" / str(index % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{index:05d}.jpg", quality=90)
    raw: Any = {"image": Stored(store="raw"), "label": Int()}
    convert(directory / "folder", directory / "jpeg.beton")
    convert(directory / "folder", directory / "raw.beton", fields=raw)
    jpeg: Any = {"image": Stored(store="jpeg"), "label": Int()}
    convert([(p, 0) for p in photos(64)], directory / "first.beton", fields=jpeg)
    even = [(p, 0) for p in photos(256)]
    large = (np.zeros((3000, 4000, 3), np.uint8), 0)
    convert(even, directory / "even.beton", fields=jpeg)
    convert([*even[:-1], large], directory / "large.beton", fields=jpeg)
    tiny = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    np.save(directory / "small.npy", tiny)
    convert([(pixels, i % 10) for i, pixels in enumerate(tiny)], directory / "small.beton")


def make_index(path: Path) -> None:
    """Write the tables of a file with as many samples as ImageNet, without their pixels."""
    from torchweld_ffcv import layout

    kinds = [layout.METADATA[layout.IMAGE], layout.METADATA[layout.INT]]
    rows = np.zeros(MILLION, layout.metadata_dtype(kinds))
    begin = layout.align(layout.metadata_offset(2) + rows.nbytes, layout.PAGE_BYTES)
    rows["f0"]["width"], rows["f0"]["height"] = 500, 400
    rows["f0"]["data_ptr"] = begin + 100_000 * np.random.default_rng(0).permutation(MILLION)
    table = np.zeros(MILLION, layout.ALLOCATION)
    table["sample_id"], table["ptr"], table["size"] = (
        range(MILLION),
        rows["f0"]["data_ptr"],
        99_000,
    )
    end = layout.align(begin + 100_000 * MILLION, layout.PAGE_BYTES)
    head = layout.header(
        num_fields=2,
        page_bytes=layout.PAGE_BYTES,
        num_samples=MILLION,
        table_offset=end,
    )
    fields = layout.descriptors([(layout.IMAGE, "image", b""), (layout.INT, "label", b"")])
    with path.open("wb") as file:
        file.write(head + fields + rows.tobytes())
        file.seek(end)  # a hole: nothing is stored for it
        file.write(table.tobytes())


# ---- candidates: each returns a function that reads one epoch ------------------------------------

Epoch = Callable[[], int]


def ours(directory: Path, data: str, layout: str) -> Epoch:
    """The data source of this plugin."""
    from dataclasses import fields

    import torch

    from torchweld.interfaces import Env, LoaderRequest
    from torchweld_ffcv import IMAGENET, FfcvOptions, image
    from torchweld_ffcv.source import FfcvSource

    crop: Any = {} if data == "small" else {"crop": "random_resized", "size": 224}
    how: Any = {
        "flip": 0.5,
        "normalize": IMAGENET,
        "layout": layout or "contiguous",
        **crop,
    }
    chosen = FfcvOptions(
        batch_size=BATCHES.get(data, 64),
        num_workers=WORKERS,
        spec={"image": image(**how)},
    )
    options = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
    env = Env(0, 1, 0, torch.device("cpu"))
    request = LoaderRequest(directory / f"{data}.beton", train=True, env=env, seed=0)
    loader: Any = FfcvSource(**options).build(request)
    epochs = iter(range(1000))

    def epoch() -> int:
        loader.set_epoch(next(epochs))
        return _count(loader)

    return epoch


def stock(directory: Path, data: str, layout: str) -> Epoch:
    """FFCV's own loader and operations, as its documentation shows them."""
    from ffcv.fields.decoders import (
        IntDecoder,
        RandomResizedCropRGBImageDecoder,
        SimpleRGBImageDecoder,
    )
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import (
        NormalizeImage,
        RandomHorizontalFlip,
        Squeeze,
        ToTensor,
        ToTorchImage,
    )

    decoder = SimpleRGBImageDecoder()
    if data != "small":
        decoder = RandomResizedCropRGBImageDecoder((224, 224))
    mean, std = np.array(MEAN) * 255, np.array(STD) * 255
    loader = Loader(
        str(directory / f"{data}.beton"),
        batch_size=BATCHES[data],
        num_workers=WORKERS,
        order=OrderOption.RANDOM,
        drop_last=False,
        pipelines={
            "image": [
                decoder,
                RandomHorizontalFlip(),
                NormalizeImage(mean, std, np.float32),
                ToTensor(),
                ToTorchImage(channels_last=layout == "channels_last"),
            ],
            "label": [IntDecoder(), ToTensor(), Squeeze(1)],
        },
    )
    return lambda: _count(loader)


def v2(directory: Path, data: str, _layout: str) -> Epoch:
    """A DataLoader with torchvision's decoder and v2 transforms of tensors."""
    import torch
    from torchvision.io import decode_image, read_file
    from torchvision.transforms import v2 as t

    torch.set_num_threads(1)
    rest = [
        t.RandomHorizontalFlip(),
        t.ToDtype(torch.float32, scale=True),
        t.Normalize(MEAN, STD),
    ]
    if data == "small":
        pixels = torch.from_numpy(np.load(directory / "small.npy")).permute(0, 3, 1, 2).contiguous()
        transform = t.Compose(rest)
        return _dataloader(pixels.shape[0], lambda i: (transform(pixels[i]), i % 10), BATCHES[data])
    transform = t.Compose([t.RandomResizedCrop(224, antialias=True), *rest])
    files = _files(directory)
    return _dataloader(
        len(files),
        lambda i: (transform(decode_image(read_file(files[i]))), i % 10),
        BATCHES[data],
    )


def pil(directory: Path, data: str, _layout: str) -> Epoch:
    """A DataLoader with Pillow, as torchvision's ImageFolder has it."""
    import torch
    from PIL import Image
    from torchvision.transforms import v2 as t

    torch.set_num_threads(1)
    transform = t.Compose(
        [
            t.RandomResizedCrop(224, antialias=True),
            t.RandomHorizontalFlip(),
            t.ToImage(),
            t.ToDtype(torch.float32, scale=True),
            t.Normalize(MEAN, STD),
        ]
    )
    files = _files(directory)

    def read(index: int) -> Any:
        return transform(Image.open(files[index]).convert("RGB")), index % 10

    return _dataloader(len(files), read, BATCHES[data])


def vectorised(directory: Path, data: str, _layout: str) -> Epoch:
    """Whole batches of an array in memory, by hand."""
    import torch

    pixels = torch.from_numpy(np.load(directory / f"{data}.npy")).permute(0, 3, 1, 2).contiguous()
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) * 255 for each in (MEAN, STD))

    def epoch() -> int:
        for chosen in torch.randperm(len(pixels)).split(BATCHES[data]):
            images = pixels[chosen].float()
            flipped = torch.rand(len(chosen), 1, 1, 1) < 0.5
            torch.where(flipped, images.flip(-1), images).sub_(mean).div_(std)
        return len(pixels)

    return epoch


def decode(directory: Path, data: str, _layout: str) -> Epoch:
    """Only libjpeg-turbo, in one thread, from memory: FFCV's own function, called in a loop."""
    from torchweld_ffcv.beton import read_beton
    from torchweld_ffcv.columns import FileData, images_of
    from torchweld_ffcv.imports import libffcv_address
    from torchweld_ffcv.pixels import decode_images

    beton = read_beton(directory / f"{data}.beton")
    rows, file = beton.metadata["f0"], FileData(beton)
    images = images_of(rows, np.arange(len(rows)), file)
    address = libffcv_address("imdecode")

    def epoch() -> int:
        decode_images(file.bytes, images, address)
        return len(rows)

    return epoch


CANDIDATES = {
    "ours": ours,
    "stock": stock,
    "v2": v2,
    "pil": pil,
    "vectorised": vectorised,
    "decode": decode,
}
OF_DATA = {
    "jpeg": [
        "ours",
        "ours channels_last",
        "stock",
        "stock channels_last",
        "v2",
        "pil",
        "decode",
    ],
    "raw": ["ours", "ours channels_last", "stock", "stock channels_last", "v2"],
    "small": [
        "ours",
        "ours channels_last",
        "stock",
        "stock channels_last",
        "v2",
        "vectorised",
    ],
}


def _files(directory: Path) -> list[str]:
    return sorted(str(path) for path in (directory / "folder").glob("*/*.jpg"))


def _dataloader(count: int, read: Callable[[int], Any], batch_size: int) -> Epoch:
    from torch.utils.data import DataLoader, Dataset

    class Read(Dataset[Any]):
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> Any:
            return read(index)

    loader = DataLoader(Read(), batch_size, shuffle=True, num_workers=WORKERS)
    return lambda: _count(loader)


def _count(batches: Iterable[Any]) -> int:
    return sum(len(batch[1]) for batch in batches)
