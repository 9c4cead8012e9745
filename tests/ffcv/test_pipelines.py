"""FFCV's own pipelines, run unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ffcv.reading import ROOT, digest, labels, load, pictures, write
from torchweld.errors import InvalidArgument, RunError
from torchweld_ffcv.install import ffcv_module

decoders, transforms = ffcv_module("ffcv.fields.decoders"), ffcv_module("ffcv.transforms")
IntDecoder, SimpleRGBImageDecoder = decoders.IntDecoder, decoders.SimpleRGBImageDecoder
Squeeze, ToTensor, ToTorchImage = transforms.Squeeze, transforms.ToTensor, transforms.ToTorchImage
Operation: Any = ffcv_module("ffcv.pipeline.operation").Operation
AllocationQuery = ffcv_module("ffcv.pipeline.allocation_query").AllocationQuery
Compiler = ffcv_module("ffcv.pipeline.compiler").Compiler


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine raw pictures of one size."""
    return write(tmp_path_factory.mktemp("small") / "small.beton", pictures(9, 8, 8))


@pytest.fixture
def uncompiled() -> Any:
    """Run FFCV's operations as Python: the same results without seconds of compilation."""
    Compiler.set_enabled(False)
    yield
    Compiler.set_enabled(True)


class Noise(Operation):  # type: ignore[misc]  # ffcv has no type information
    """A user's own operation, written as FFCV asks for it; it compiles fast."""

    def generate_code(self) -> Callable[..., Any]:
        indices = Compiler.get_iterator()

        def noisy(images: Any, memory: Any) -> Any:
            for i in indices(images.shape[0]):
                memory[i, 0, 0, 0] = images[i, 0, 0, 0] // 2 + np.uint8(127 * np.random.rand())
            return memory

        noisy.is_parallel = True  # type: ignore[attr-defined]  # FFCV's way to say so
        return noisy

    def declare_state_and_memory(self, previous: Any) -> Any:
        return previous, AllocationQuery((1, 1, 1), previous.dtype)


def pipelines() -> dict[str, list[Any]]:
    """With chance, which numba's own random numbers make."""
    return {
        "image": [SimpleRGBImageDecoder(), Noise(), ToTensor()],
        "label": [IntDecoder(), ToTensor(), Squeeze()],
    }


def plain() -> dict[str, list[Any]]:
    """Without chance and without compilation worth mentioning."""
    return {
        "image": [SimpleRGBImageDecoder(), ToTensor(), ToTorchImage()],
        "label": [IntDecoder(), ToTensor(), Squeeze()],
    }


def test_compiled_pipelines_give_the_same_pixels_for_a_seed_on_any_number_of_threads(
    small: Path,
) -> None:
    one, two = (load(small, batch_size=4, pipelines=pipelines(), num_workers=n) for n in (1, 2))
    first, again = digest(one), digest(two)
    two.set_epoch(1)
    assert first == again
    assert not set(first) & set(digest(two))


@pytest.mark.usefixtures("uncompiled")
def test_the_values_are_those_of_the_file(small: Path) -> None:
    loader = load(small, batch_size=4, shuffle=False, pipelines=plain())

    batches = list(loader)

    found = [one.permute(1, 2, 0).numpy() for images, _ in batches for one in images]
    assert all(np.array_equal(a, b) for a, (b, _) in zip(found, pictures(9, 8, 8), strict=True))
    assert labels(batches) == list(range(9))
    assert str(loader.contract) == (
        "tuple of image (batch, 3, 8, 8) uint8 channels_last, label (batch,) int64"
    )


@pytest.mark.usefixtures("uncompiled")
def test_labels_have_shape_batch_also_for_a_last_batch_of_one(small: Path) -> None:
    squeezed = load(small, batch_size=8, pipelines=plain())
    unsqueezed = load(small, batch_size=8, pipelines={**plain(), "label": [IntDecoder()]})

    for loader in (squeezed, unsqueezed):
        assert [tuple(b[1].shape) for b in loader] == [(8,), (1,)]


@pytest.mark.usefixtures("uncompiled")
def test_the_users_lists_and_operations_are_left_as_they_were(small: Path) -> None:
    given = plain()
    before = {name: list(pipeline) for name, pipeline in given.items()}
    states = {id(op): dict(vars(op)) for pipeline in given.values() for op in pipeline}

    first, second = (digest(load(small, batch_size=4, pipelines=given)) for _ in range(2))

    assert first == second
    assert given == before
    assert {id(op): dict(vars(op)) for p in given.values() for op in p} == states


@pytest.mark.usefixtures("uncompiled")
def test_stock_ffcv_takes_the_decoder_out_of_the_users_list(small: Path) -> None:
    given, threads = plain(), torch.get_num_threads()

    ffcv_module("ffcv.loader").Loader(str(small), batch_size=4, num_workers=1, pipelines=given)
    torch.set_num_threads(threads)

    assert [type(op).__name__ for op in given["image"]] == ["ToTensor", "ToTorchImage"]


@pytest.mark.usefixtures("uncompiled")
def test_batches_are_owned(small: Path) -> None:
    loader = load(small, batch_size=1, shuffle=False, pipelines=plain())

    assert labels(list(loader)) == list(range(9))


@pytest.mark.usefixtures("uncompiled")
def test_a_field_without_a_pipeline_has_ffcvs_default_and_none_leaves_it_out(small: Path) -> None:
    both = load(small, batch_size=4, pipelines={})
    one = load(small, batch_size=4, pipelines={"image": None}, shuffle=False)

    assert [field.name for field in both.contract.fields] == ["image", "label"]
    assert [batch[0].tolist() for batch in one] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


class Failing(Operation):  # type: ignore[misc]  # ffcv has no type information
    """Raises for one picture."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def generate_code(self) -> Callable[..., Any]:
        wanted = torch.from_numpy(pictures(9, 8, 8)[self.number][0])

        def fail(images: torch.Tensor, _memory: Any) -> torch.Tensor:
            if any(torch.equal(image, wanted) for image in images):
                raise ZeroDivisionError("a picture that cannot be")
            return images

        return fail

    def declare_state_and_memory(self, previous: Any) -> Any:
        return previous, None


@pytest.mark.usefixtures("uncompiled")
def test_what_an_operation_raises_is_raised_here_with_sample_and_field(small: Path) -> None:
    given = {**plain(), "image": [SimpleRGBImageDecoder(), ToTensor(), Failing(6)]}
    loader = load(small, batch_size=4, shuffle=False, pipelines=given)
    batches = iter(loader)
    next(batches)

    with pytest.raises(RunError, match=r"'image' failed at sample 6 of .*ZeroDivisionError"):
        next(batches)
    loader.close()


def test_what_cannot_be_compiled_is_an_error_at_once(small: Path) -> None:
    wrong_order = {
        "image": [SimpleRGBImageDecoder(), ToTensor(), transforms.RandomTranslate(padding=2)]
    }

    with pytest.raises(InvalidArgument, match="the order is decoder"):
        load(small, batch_size=4, pipelines=wrong_order)


def test_a_field_that_does_not_exist_is_named_with_those_that_do(small: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"'imgae' is no field .* 'image', 'label'"):
        load(small, batch_size=4, pipelines={"imgae": [ToTensor()]})


def test_importing_ffcv_leaves_the_number_of_threads_alone(small: Path) -> None:
    code = (
        "import torch; torch.set_num_threads(3)\n"
        "from torchweld_ffcv.install import ffcv_module\n"
        "ffcv_module('ffcv'); import numba\n"
        "from ffcv.pipeline import compiler\n"
        "print(torch.get_num_threads(), compiler.set_num_threads is numba.set_num_threads)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stdout.split() == ["3", "True"], done.stderr


TWO_AT_ONCE = """
import sys
from tests.ffcv.reading import labels, load
from tests.ffcv.test_pipelines import pipelines
train = load(sys.argv[1], batch_size=2, pipelines=pipelines(), num_workers=2)
val = load(sys.argv[1], batch_size=2, pipelines=pipelines(), num_workers=2, train=False)
for epoch in range(20):
    pairs = list(zip(train, val))
print(sorted(labels(pair[0] for pair in pairs)) == labels(pair[1] for pair in pairs))
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_two_loaders_at_once_live_with_every_threading_layer(small: Path, layer: str) -> None:
    # Stock FFCV's processes are aborted on workqueue: "Concurrent access has been detected".
    path = os.pathsep.join([str(ROOT), *sys.path])  # this code, wherever it is imported from
    environ = {**os.environ, "PYTHONPATH": path, "NUMBA_THREADING_LAYER": layer}

    done = subprocess.run(
        [sys.executable, "-c", TWO_AT_ONCE, str(small)],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
    )

    assert (done.stdout.split(), done.returncode) == (["True"], 0), done.stderr
