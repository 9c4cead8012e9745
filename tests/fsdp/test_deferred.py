"""Models whose tensors get their values later: bitwise those of an eager build."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fsdp.constructors import (
    ZOO,
    Applied,
    Fill,
    Make,
    catches_the_failure,
    hides_a_tensor,
    keeps_a_parameter,
    makes_numpy,
    module,
    uses_singular_values,
)
from torchweld import rng
from torchweld.errors import InvalidArgument
from torchweld.testing import run_ranks
from torchweld.testing.models import mlp
from torchweld_fsdp.deferred import Deferred, defer
from torchweld_fsdp.units import find_units


def seeded(make: Callable[[], Any], seed: int = 3) -> Any:
    rng.seed_all(seed)
    return make()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def deferred(make: Make) -> tuple[Any, Deferred]:
    model, values, reason = seeded(lambda: defer(make))
    assert values is not None, reason
    return model, values


def random_state() -> list[Any]:
    leaves = tree_leaves(rng.capture())
    return [leaf.tolist() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def assert_equal_to_eager(make: Make) -> None:
    eager = seeded(make)
    state = random_state()

    model, values = deferred(make)

    assert random_state() == state
    assert list(tensors(model)) == list(tensors(eager))
    for name, expected in tensors(eager).items():
        value = values.materialise(tensors(model)[name])
        assert (value.dtype, value.stride()) == (expected.dtype, expected.stride()), name
        assert torch.equal(value, expected), name
    assert random_state() == state


@pytest.mark.parametrize("name", ZOO)
def test_every_tensor_has_the_values_of_an_eager_build(name: str) -> None:
    assert_equal_to_eager(ZOO[name])


@pytest.mark.parametrize(
    "name",
    ["resnet18", "vit_b_16", "swin_t", "convnext_tiny", "efficientnet_b0", "regnet_y_400mf"],
)
def test_torchvision_models_have_the_values_of_an_eager_build(name: str) -> None:
    assert_equal_to_eager(getattr(pytest.importorskip("torchvision.models"), name))


def test_the_default_dtype_is_that_of_the_eager_build() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert_equal_to_eager(Applied)
    finally:
        torch.set_default_dtype(torch.float32)


def test_filling_the_meta_model_by_its_own_means_is_not_equal() -> None:
    eager = seeded(Applied)

    with torch.device("meta"):
        model = seeded(Applied)
    rng.seed_all(3)
    model.to_empty(device="cpu").apply(_reset)

    assert not torch.equal(model.first.weight, eager.first.weight)


def _reset(layer: Any) -> None:
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()


def test_a_layout_that_only_the_meta_device_chooses_keeps_the_values() -> None:
    def fill(made: Any) -> None:
        images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        made.register_buffer("rolled", images.roll(1, 0))

    eager: Any = seeded(module(fill))
    model, values = deferred(module(fill))

    assert model.rolled.stride() != eager.rolled.stride()
    assert torch.equal(values.materialise(model.rolled), eager.rolled)


def test_the_order_and_number_of_requests_do_not_matter() -> None:
    eager = tensors(seeded(Applied))
    model, values = deferred(Applied)

    for name in [*reversed(eager), *eager]:
        torch.rand(3)
        assert torch.equal(values.materialise(tensors(model)[name]), eager[name])


def test_fill_puts_the_values_in_and_keeps_ties_flags_and_attributes() -> None:
    def make() -> nn.Module:
        model = Applied()
        model.first.bias.requires_grad_(False)
        setattr(model.first.weight, "decay", 0.5)  # noqa: B010 - no attribute that mypy knows
        return model

    eager = seeded(make)
    model, values = deferred(make)

    values.fill(model.first)
    values.fill(model)

    assert all(torch.equal(t, tensors(eager)[name]) for name, t in tensors(model).items())
    assert model.last.weight is model.embedding.weight
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]
    assert model.first.weight.decay == 0.5


def test_a_recurrent_layer_computes_after_fill() -> None:
    x = torch.ones(2, 3, 5)
    eager: Any = seeded(ZOO["lstm"])
    model, values = deferred(ZOO["lstm"])

    values.fill(model)

    assert torch.equal(model(x)[0], eager(x)[0])


def test_plain_attributes_have_their_values_at_once() -> None:
    def fill(made: Any) -> None:
        made.layer = nn.Linear(2, 2)
        made.frequencies = {"low": [torch.arange(3.0)], "high": torch.randn(2)}

    eager = seeded(module(fill))
    model, _ = deferred(module(fill))

    assert model.layer.weight.is_meta
    for given, expected in zip(
        tree_leaves(model.frequencies), tree_leaves(eager.frequencies), strict=True
    ):
        assert torch.equal(given, expected)


def test_tensors_with_values_are_returned_and_strangers_refused() -> None:
    _, values = deferred(mlp)
    real = torch.ones(2)

    assert values.materialise(real) is real
    assert not values.knows(real)
    assert not values.knows(torch.empty(5, device="meta"))
    with pytest.raises(InvalidArgument, match=r"shape \(5,\) on the meta device is not of the mo"):
        values.materialise(torch.empty(5, device="meta"))


def test_a_tensor_that_was_changed_without_values_is_refused() -> None:
    model, values = deferred(Applied)
    nn.init.zeros_(model.first.weight)

    assert values.knows(model.first.bias)
    assert not values.knows(model.first.weight)
    assert torch.equal(values.materialise(model.first.bias), seeded(Applied).first.bias)
    with pytest.raises(InvalidArgument, match=r"shape \(30, 20\) was changed after its constr"):
        values.materialise(model.first.weight)


# ---- memory --------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of all CPU storages that operations have seen and that are still alive.

    Of a sharded tensor it sees the operations on the part of this rank.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no hints
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)
        alive = [ref() for ref in self._storages.values()]
        self.peak = max(self.peak, sum(s.nbytes() for s in alive if s is not None))
        return out


def deep() -> nn.Module:
    layers = [nn.Linear(100, 100) for _ in range(20)]
    for layer in layers:
        nn.init.trunc_normal_(layer.weight)
    return nn.Sequential(*layers)


def test_building_and_filling_one_by_one_never_holds_the_model() -> None:
    model_bytes = sum(4 * p.numel() for p in deep().parameters())

    with LiveBytes() as eager:
        seeded(deep)
    with LiveBytes() as live:
        model, values = deferred(deep)
        for parameter in model.parameters():
            values.materialise(parameter)

    assert eager.peak >= model_bytes
    assert live.peak < model_bytes / 2


class Blocks(nn.Module):
    """Tied ends around blocks, all initialised anew at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(65, 65, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(65), nn.Linear(65, 97), nn.Tanh(), nn.Linear(97, 65))
            for _ in range(8)
        )
        self.last = nn.Linear(65, 65, bias=False)
        self.last.weight = self.first.weight
        self.apply(self._initialise)

    def _initialise(self, layer: nn.Module) -> None:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)


def _shard_while_filling() -> tuple[bool, bool, float]:
    """Equal to eager, tied, and the peak as part of the whole model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    eager = seeded(Blocks)
    with LiveBytes() as live:
        model, values = deferred(Blocks)
        for _, unit in find_units(model):
            values.fill(unit)
            fully_shard(unit, mesh=mesh)
        values.fill(model)
        fully_shard(model, mesh=mesh)
    pairs = zip(model.parameters(), eager.parameters(), strict=True)
    equal = all(torch.equal(sharded.full_tensor(), whole) for sharded, whole in pairs)
    tied = model.last.weight is model.first.weight
    return equal, tied, live.peak / sum(4 * p.numel() for p in eager.parameters())


def test_sharding_each_unit_once_it_is_filled_equals_sharding_the_eager_model() -> None:
    results = run_ranks(_shard_while_filling, 2)

    assert [result[:2] for result in results] == [(True, True), (True, True)]
    assert all(peak < 0.75 for _, _, peak in results)  # a half is the shard of this rank


# ---- constructors that need their values ---------------------------------------------------------


@pytest.mark.parametrize(
    ("fill", "why"),
    [
        (makes_numpy, "can't convert meta device type tensor to numpy"),
        (catches_the_failure, "can't convert meta device type tensor to numpy"),
        (keeps_a_parameter, "a parameter or buffer is also kept under a plain attribute"),
        (hides_a_tensor, "a tensor is kept outside of the modules"),
        (uses_singular_values, "_linalg_svd may give other bits while recorded"),
        (lambda made: setattr(made, "a", nn.LazyLinear(3)), "uninitialized parameter"),
    ],
)
def test_what_cannot_be_deferred_is_built_at_once_and_said(fill: Fill, why: str) -> None:
    eager = seeded(module(fill))
    state = random_state()

    model, values, reason = seeded(lambda: defer(module(fill)))

    assert values is None
    assert reason.startswith("the model was built at once")
    assert why in reason
    assert random_state() == state
    if why != "uninitialized parameter":
        assert all(torch.equal(t, tensors(eager)[name]) for name, t in tensors(model).items())


def test_a_generator_from_outside_is_drawn_from_once() -> None:
    def fill(made: Any) -> None:
        made.a = nn.Parameter(torch.empty(3).normal_(generator=generator))
        made.a.data.numpy()

    generator = torch.Generator().manual_seed(1)
    eager = seeded(module(fill))
    after = generator.get_state()
    generator.manual_seed(1)
    model, _, reason = seeded(lambda: defer(module(fill)))

    assert reason
    assert torch.equal(model.a, eager.a)
    assert torch.equal(generator.get_state(), after)


def test_another_default_device_is_respected_and_said() -> None:
    with _default_device("meta"):
        model, values, reason = defer(mlp)

    assert (values, reason) == (None, "the model was built at once, as the default device is meta")
    assert all(p.device.type == "meta" for p in model.parameters())


@contextmanager
def _default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        # torch 2.7 keeps None as a device, and whoever asks for the default one fails.
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)


def test_an_error_of_the_constructor_itself_is_raised() -> None:
    def fill(made: Any) -> None:
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        defer(module(fill))
