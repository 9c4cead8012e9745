"""What the matrix chooses from, and small models and data that each choice can act on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchweld.components import CheckpointingOptions, CompileOptions

SAMPLES = 16

Choice = tuple[str, Mapping[str, Any]]
"""A name and its options."""

STRATEGIES: Mapping[str, Choice] = {
    "single": ("single", {}),
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fairscale_oss": ("fairscale_oss", {}),
    "fairscale_sdp": ("fairscale_sdp", {}),
    # Below so many elements a parameter stays whole at stage 3; here most are cut.
    **{
        f"deepspeed stage {stage}": (
            "deepspeed",
            {"stage": stage, **({"persistence_threshold": 100} if stage == 3 else {})},
        )
        for stage in (1, 2, 3)
    },
}
ELSEWHERE: Mapping[str, Choice] = {
    "fairscale_fsdp": ("fairscale_fsdp", {}),
    "fsdp offloaded": ("fsdp", {"cpu_offload": True}),
    "deepspeed stage 2 offloaded": ("deepspeed", {"stage": 2, "offload_optimizer": "cpu"}),
    "deepspeed stage 3 offloaded": (
        "deepspeed",
        {
            "stage": 3,
            "offload_optimizer": "cpu",
            "offload_params": "cpu",
            "persistence_threshold": 100,
        },
    ),
}
"""Strategies that are made for GPUs, with what a CPU makes of them."""

OF_IMAGES: Mapping[str, Choice] = {
    "blurpool": ("BlurPool", {}),
    "channels_last": ("ChannelsLast", {}),
    "cutmix": ("CutMix", {}),
    "label_smoothing": ("LabelSmoothing", {}),
    "cutmix by loss": ("CutMix", {"interpolate_loss": True}),
    "mixup": ("MixUp", {}),
    "cutout": ("CutOut", {}),
    "colout": ("ColOut", {}),
    "progressive_resizing": ("ProgressiveResizing", {"delay_fraction": 0.2}),
    "selective_backprop": ("SelectiveBackprop", {"start": 0.0, "end": 1.0}),
    "ema": ("EMA", {"half_life": "2ba"}),
    "swa": ("SWA", {"swa_start": "0.3dur", "swa_end": "0.8dur", "update_interval": "1ba"}),
    "sam": ("SAM", {}),
    "squeeze_excite": ("SqueezeExcite", {"min_channels": 8}),
    "factorize": (
        "Factorize",
        {"min_channels": 8, "latent_channels": 0.25, "min_features": 4, "latent_features": 2},
    ),
    "ghost_batchnorm": ("GhostBatchNorm", {"ghost_batch_size": 2}),
    "weight_standardization": ("WeightStandardization", {}),
    "stochastic_depth": (
        "StochasticDepth",
        {
            "target_layer_name": "ResNetBottleneck",
            "stochastic_method": "sample",
            "drop_rate": 0.5,
        },
    ),
    "stochastic_depth of blocks": (
        "StochasticDepth",
        {"target_layer_name": "ResNetBottleneck", "stochastic_method": "block", "drop_rate": 0.5},
    ),
    "layer_freezing": ("LayerFreezing", {"freeze_start": 0.0, "freeze_level": 1.0}),
    "gradient_clipping": (
        "GradientClipping",
        {"clipping_type": "norm", "clipping_threshold": 0.05},
    ),
    "gradient_clipping by value": (
        "GradientClipping",
        {"clipping_type": "value", "clipping_threshold": 0.01},
    ),
    "gradient_clipping, adaptive": (
        "GradientClipping",
        {"clipping_type": "adaptive", "clipping_threshold": 0.01},
    ),
    "gyro_dropout": ("GyroDropout", {"sigma": 4, "tau": 2}),
    "low_precision_layernorm": ("LowPrecisionLayerNorm", {}),
}
OF_SAMPLES: Mapping[str, Choice] = {
    "augmix": ("AugMix", {}),
    "randaugment": ("RandAugment", {}),
    "colout of samples": ("ColOut", {"batch": False}),
}
OF_TEXT: Mapping[str, Choice] = {
    "alibi": ("Alibi", {"max_sequence_length": 16, "train_sequence_length_scaling": 0.5}),
    "gated_linear_units": ("GatedLinearUnits", {}),
    "seq_length_warmup": (
        "SeqLengthWarmup",
        {"duration": 1.0, "min_seq_length": 4, "max_seq_length": 16, "step_size": 4},
    ),
}
SURGERIES: Mapping[str, Choice] = {**OF_IMAGES, **OF_SAMPLES, **OF_TEXT}
IN_TEXT_TOO = (
    "ema",
    "swa",
    "sam",
    "layer_freezing",
    "gradient_clipping",
    "gradient_clipping by value",
    "gradient_clipping, adaptive",
    "low_precision_layernorm",
)
"""Those of images that find something to act on in a language model that computes its loss."""
LEAVE_PARAMETERS_OUT = {"stochastic_depth of blocks", "layer_freezing"}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    # The graph of forward and backward is traced and cut as ever; only no C++ is made of it.
    "compile": {"compile": CompileOptions(backend="aot_eager")},
    "activation_checkpointing": {"activation_checkpointing": CheckpointingOptions("Bottleneck")},
    "sync_batchnorm": {"sync_batchnorm": True},
}
"""Settings of the Trainer that a surgery or a strategy could be in the way of."""


@dataclass(frozen=True)
class Cell:
    """What is chosen, in the order in which the user lists it.

    Attributes:
        strategy: a key of ``STRATEGIES`` or ``ELSEWHERE``, or the name of a component.
        data: ``torch`` or ``ffcv``.
        surgeries: keys of ``SURGERIES``, or names of components.
        precision: as the Trainer takes it.
        processes: None: one for ``single``, two for everything else.
        setting: a key of ``SETTINGS``, or nothing.
    """

    strategy: str = "ddp"
    data: str = "torch"
    surgeries: tuple[str, ...] = ()
    precision: str = "32"
    processes: int | None = None
    setting: str = ""

    @property
    def world_size(self) -> int:
        """How many processes run it."""
        return self.processes or (1 if self.strategy == "single" else 2)

    @property
    def task(self) -> Task:
        """The model and the data that all its surgeries can act on."""
        if OF_TEXT.keys() & set(self.surgeries):
            return TASKS["text"]
        return TASKS["samples" if OF_SAMPLES.keys() & set(self.surgeries) else "images"]


class Images(Dataset[Any]):
    """Small pictures in four classes, as the article's data: uint8 pixels and a transform."""

    def __init__(self, num_samples: int = SAMPLES) -> None:
        from torchvision.transforms import v2

        random = torch.Generator().manual_seed(7)
        shape = (num_samples, 3, 8, 8)
        self.pixels = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        self.labels = torch.randint(4, (num_samples,), generator=random).tolist()
        self.transform: Any = v2.ToDtype(torch.float32, scale=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.pixels[index]  # ffcv stores them and makes the transform its own
        return self.transform(pixels) if self.transform else pixels, self.labels[index]


def make_net() -> nn.Module:
    """Something for every surgery: strided and wide convolutions, pooling, BatchNorm, a block."""
    from torchvision.models.resnet import Bottleneck

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Bottleneck(16, 4),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.GroupNorm(1, 16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Dropout(0.1),
        nn.Linear(16, 4),
    )


class Samples(Images):
    """The same as pixels that a transform of single samples can take: the model scales them."""

    def __init__(self, num_samples: int = SAMPLES) -> None:
        super().__init__(num_samples)
        self.transform = None


class Scaled(nn.Module):
    """Makes floating values of pixels, in the dtype of the model."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(1 / 255))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels * self.factor


def make_net_of_pixels() -> nn.Module:
    """The net behind a layer that scales."""
    return nn.Sequential(Scaled(), *make_net())  # type: ignore[misc]  # a Sequential has children


class Sentences(Dataset[Any]):
    """Tokens drawn at random, each to be told again; a mapping, as language models take it."""

    def __init__(self, num_samples: int = SAMPLES) -> None:
        random = torch.Generator().manual_seed(7)
        self.tokens = torch.randint(3, 32, (num_samples, 16), generator=random)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": tokens,
        }


def make_bert() -> nn.Module:
    """A language model that Composer's algorithms for text know; it computes its own loss."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config: Any = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"  # which the algorithms know
    model: Any = BertForMaskedLM(config)
    model.cls.predictions.bias.requires_grad_(False)  # unused: the decoder has its own
    return model  # type: ignore[no-any-return]  # of an untyped library


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        make_model: builds the model, always the same.
        make_data: makes the data, for training and validation.
        loss: as ``fit`` takes it; None: the model computes it.
    """

    make_model: Callable[[], nn.Module]
    make_data: Callable[[], Dataset[Any]]
    loss: Callable[[Any, Any], Tensor] | None


TASKS: Mapping[str, Task] = {
    "images": Task(make_net, Images, F.cross_entropy),
    "samples": Task(make_net_of_pixels, Samples, F.cross_entropy),
    "text": Task(make_bert, Sentences, None),
}
