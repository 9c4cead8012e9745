"""Which modules become units: the rule, the user's choice, and what stays in the root."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import (
    CustomPolicy,
    ModuleWrapPolicy,
    _recursive_wrap,
    size_based_auto_wrap_policy,
)

from torchweld.errors import InvalidArgument
from torchweld.testing import RanksFailed, run_ranks
from torchweld.testing.models import TinyGpt, batchnorm_convnet, mlp
from torchweld_fsdp.units import Units, choose_units, find_units


class Block(nn.Module):
    """Two layers and a norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(torch.relu(self.up(x)))
        return x + down


class WideBlock(Block):
    """A subclass."""


class Net(nn.Module):
    """A stem, two blocks and a head; ``tied`` makes the head the stem's weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(), WideBlock()])
        self.head = nn.Linear(8, 8, bias=False)
        if tied:
            self.head.weight = self.stem.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]  # a module returns Any


class Stack(nn.ModuleList):
    """A container that can be called, like DenseNet's blocks."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


def names(units: Units) -> list[str]:
    return [name for name, _ in units.units]


def classes(units: Units) -> dict[str, int]:
    return dict(Counter(type(module).__name__ for _, module in units.units))


# ---- the rule ------------------------------------------------------------------------------------

TABLE = [
    ("resnet18", {"BasicBlock": 8}, 0.96, 0.40),
    ("resnet50", {"Bottleneck": 13}, 0.91, 0.24),
    ("vit_b_16", {"EncoderBlock": 12}, 0.98, 0.08),
    ("swin_t", {"SwinTransformerBlock": 10, "PatchMerging": 2}, 0.96, 0.25),
    ("convnext_tiny", {"CNBlock": 15}, 0.91, 0.17),
    ("efficientnet_b0", {"MBConv": 12, "Conv2dNormActivation": 1}, 0.75, 0.14),
    ("mobilenet_v3_large", {"InvertedResidual": 9, "Conv2dNormActivation": 1}, 0.53, 0.15),
    ("maxvit_t", {"MaxVitBlock": 4}, 0.97, 0.57),
    ("densenet121", {"_DenseLayer": 58, "_Transition": 2}, 0.87, 0.07),
    ("vgg16", {}, 0.0, 0.0),
]


@pytest.mark.parametrize(("name", "blocks", "share", "largest"), TABLE)
def test_blocks_of_torchvision_models_are_found(
    name: str, blocks: dict[str, int], share: float, largest: float
) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = getattr(models, name)()

    units = choose_units(model)

    assert classes(units) == blocks
    assert (round(units.share, 2), round(units.largest, 2)) == (share, largest)


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (
            nn.Transformer(8, 2, 2, 3, 8, batch_first=True),
            {"TransformerEncoderLayer": 2, "TransformerDecoderLayer": 3},
        ),
        (nn.Sequential(nn.Linear(8, 8), nn.Sequential(Block(), Block())), {"Block": 2}),
        (nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3)), {"Sequential": 3}),
        (mlp(), {}),
        (batchnorm_convnet(), {}),
        (TinyGpt(), {}),
    ],
)
def test_blocks_of_small_models_are_found(model: nn.Module, blocks: dict[str, int]) -> None:
    assert classes(choose_units(model)) == blocks


def test_only_the_outermost_of_nested_blocks_are_units() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.ModuleList([Block(), Block()])) for _ in range(2)))
    pair = nn.Sequential(nn.TransformerDecoderLayer(8, 2, 8), nn.TransformerDecoderLayer(8, 2, 8))

    assert [name for name, _ in find_units(model)] == ["0.0.0", "0.0.1", "1.0.0", "1.0.1"]
    assert [name for name, _ in find_units(pair)] == ["0", "1"]


def test_small_blocks_stay_in_the_root() -> None:
    model = nn.Sequential(nn.Linear(300, 300), Block(), Block())

    assert find_units(model) == []


def test_a_model_without_blocks_is_told_which_classes_there_are() -> None:
    (warning,) = choose_units(mlp()).warnings

    assert warning.startswith("root only: ")
    assert "wrap=" in warning
    assert "Linear" in warning


def test_blocks_inside_a_container_with_a_forward_are_taken_and_said() -> None:
    model = nn.Sequential(Stack([Block(), Block()]), Stack([Block()]))

    units = choose_units(model)

    assert names(units) == ["0.0", "0.1", "1.0"]
    (warning,) = units.warnings
    assert warning.startswith("2 Stack (0, 1) cannot be units: fully_shard refuses ModuleList")
    assert warning.endswith("the blocks in them are taken instead")


def test_the_line_for_the_plan_says_classes_and_shares() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Block(), Block())

    assert str(choose_units(model)) == "2 Block (89 % of the parameters, largest 44 %)"
    assert str(choose_units(mlp())) == "root only"


# ---- the user's choice ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (["Block"], ["blocks.0", "blocks.1"]),
        ("WideBlock", ["blocks.1"]),
        ([Block], ["blocks.0", "blocks.1"]),
        (WideBlock, ["blocks.1"]),
        (["head", "blocks.0.up", "Block"], ["blocks.0.up", "blocks.0", "blocks.1", "head"]),
        (
            lambda name, module: name.endswith(("up", "0")),
            ["blocks.0.up", "blocks.0", "blocks.1.up"],
        ),
        (ModuleWrapPolicy({WideBlock}), ["blocks.1"]),
        (CustomPolicy(lambda module: isinstance(module, Block)), ["blocks.0", "blocks.1"]),
        (200, ["blocks.0", "blocks.1"]),
        (100, ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
    ],
)
def test_every_way_to_choose_picks_what_it_names(wrap: Any, expected: list[str]) -> None:
    assert names(choose_units(Net(), wrap)) == expected


def test_modules_of_the_model_are_units() -> None:
    model = Net()

    assert names(choose_units(model, [model.head, model.blocks[0]])) == ["blocks.0", "head"]


@pytest.mark.parametrize("smallest", [10, 100, 200, 300, 600])
def test_size_picks_what_torchs_own_wrapper_picks(smallest: int) -> None:
    model = nn.Sequential(Net(), nn.MultiheadAttention(8, 2), Stack([Block()]))
    policy = partial(size_based_auto_wrap_policy, min_num_params=smallest)
    wrapped: list[nn.Module] = []

    def wrap(module: nn.Module) -> nn.Module:
        wrapped.append(module)
        return module

    _recursive_wrap(model, policy, wrap, set(), set(), only_wrap_children=True)

    assert wrapped
    for asked in (smallest, policy):
        assert [module for _, module in choose_units(model, asked).units] == wrapped


def test_shares_count_the_parameters_of_nested_units_once() -> None:
    model = Net()

    units = choose_units(model, ["Block", "blocks.0.up"])

    blocks, total = 2 * 280, 2 * 280 + 72 + 64
    assert units.share == blocks / total
    assert units.largest == 280 / total


def test_modules_without_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    assert names(choose_units(model, lambda name, module: True)) == ["0", "2"]


def test_a_container_that_was_named_is_said_to_be_none() -> None:
    units = choose_units(Net(), ["blocks", "head"])

    assert names(units) == ["head"]
    (warning,) = units.warnings
    assert warning.startswith("1 ModuleList (blocks) cannot be units: ")
    assert warning.endswith("name the classes in them")


def test_a_layer_that_attention_reads_without_calling_is_no_unit() -> None:
    units = choose_units(nn.TransformerEncoderLayer(8, 2, 8), [nn.Linear])

    assert names(units) == ["linear1", "linear2"]
    assert "'self_attn.out_proj' is no unit" in units.warnings[0]


# ---- tied weights --------------------------------------------------------------------------------


def test_units_with_one_end_of_a_tie_stay_in_the_root_and_are_named() -> None:
    units = choose_units(Net(tied=True), ["Linear", "Block"])

    assert "stem" not in names(units)
    assert "head" not in names(units)
    stem, head = units.warnings
    assert "'stem.weight' is the same parameter as 'head.weight'" in stem
    assert "'head.weight' is the same parameter as 'stem.weight'" in head


def test_a_unit_with_all_ends_of_a_tie_is_kept() -> None:
    model = nn.Sequential(Net(tied=True), nn.Linear(8, 8))

    assert names(choose_units(model, [Net, "0.stem"])) == ["0"]


def test_blocks_that_share_a_weight_are_found_and_left_out() -> None:
    first, second, third = Block(), Block(), Block()
    second.up = first.up
    model = nn.Sequential(first, second, third)

    units = choose_units(model)

    assert names(units) == ["2"]
    assert [warning[:16] for warning in units.warnings] == ["'0' is no unit b", "'1' is no unit b"]


def test_a_block_used_at_two_places_is_one_unit() -> None:
    block = Block()

    units = choose_units(nn.Sequential(block, nn.ReLU(), block), [Block])

    assert names(units) == ["0"]
    assert units.warnings == ()


def _shard_tied(way: str) -> tuple[int, bool]:
    """Parameters left and equal outputs after sharding the units found, or those asked for."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    model, x = Net(tied=True), torch.ones(2, 8)
    before = model(x)
    chosen: list[nn.Module] = [model.stem, model.head]
    if way == "kept":
        chosen = [module for _, module in choose_units(model, ["Linear", "Block"]).units]
    mesh = init_device_mesh("cpu", (1,))
    for module in chosen:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return len(list(model.parameters())), torch.equal(model(x), before)


def test_units_shard_in_their_order_and_keep_the_tie() -> None:
    assert run_ranks(_shard_tied, 1, "kept") == [(len(list(Net(tied=True).parameters())), True)]


def test_sharding_both_ends_of_a_tie_would_untie_or_raise() -> None:
    tied = len(list(Net(tied=True).parameters()))

    try:
        ((count, _),) = run_ranks(_shard_tied, 1, "asked")
    except RanksFailed as error:
        count = tied + 1 if "shared" in str(error) else 0

    assert count > tied


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            "Blok",
            "wrap= asks for 'Blok', which matches no module of the model: did you mean 'Block'?",
        ),
        (["blocks.2"], "did you mean 'blocks.1'?"),
        (
            nn.Conv2d,
            "Conv2d, which matches no module of the model: name others (its classes are: B",
        ),
        ("Net", "'Net', which matches only the root or modules without parameters"),
        (lambda name, module: False, "which matches no module"),
        (lambda module: True, "cannot be called as (name, module)"),
        (0, "wrap=0: a unit cannot have fewer than one parameter"),
        (-5, "wrap=-5"),
        (10**9, "no module below the root brings so many parameters (the model has 696)"),
        (True, "wrap=True does not say which modules are units"),
        (1.5, "wrap=1.5 does not say"),
        ([3], "wrap= has 3: give None (automatic), class names"),
        ([], "wrap=[] names no unit"),
        (nn.Linear(8, 8), "a Linear that is not a module of the model"),
        (CustomPolicy(lambda module: {"mixed_precision": None}), "(mixed_precision), which only"),
        (ModuleWrapPolicy({nn.Conv2d}), "which matches no module"),
    ],
)
def test_a_choice_that_cannot_be_is_an_error_with_what_to_do(wrap: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        choose_units(Net(), wrap)
