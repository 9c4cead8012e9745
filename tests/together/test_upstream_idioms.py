"""What other libraries' users have already is accepted as it is, all of it in one run.

A DeepSpeed JSON or a wrap policy of torch's FSDP, FFCV's lists of operations, and a list of
Composer's algorithms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.composer.small_nets import algorithm, make_sgd
from tests.together.matrix_choices import Images, make_net
from tests.together.matrix_runs import be_quiet, exported
from torchweld import Trainer, use
from torchweld.testing import run_ranks

JSON = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
}


class Net(nn.Module):
    """Takes the pixels as FFCV's operations leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_net()

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(images.float() / 255)
        return out


def train(strategy: str, config: str, cache: str) -> dict[str, Tensor]:
    """Two epochs under the strategy of a DeepSpeed file, or with a policy of torch's."""
    be_quiet()
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.transforms import Squeeze, ToTensor, ToTorchImage
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from torchvision.models.resnet import Bottleneck

    chosen: dict[str, Any] = {
        "deepspeed": use("deepspeed", config=config),
        "fsdp": use("fsdp", wrap=ModuleWrapPolicy({Bottleneck})),
    }
    pipelines = {
        "image": [SimpleRGBImageDecoder(), ToTensor(), ToTorchImage()],
        "label": [IntDecoder(), ToTensor(), Squeeze()],
    }
    trainer = Trainer(
        strategy=chosen[strategy],
        data=use("ffcv", batch_size=4, shuffle=False, cache_dir=cache, pipelines=pipelines),
        surgery=[algorithm(name) for name in ("BlurPool", "CutMix", "LabelSmoothing")],
        gradient_clip_val=0.5,
        max_epochs=2,
        seed=3,
        accelerator="cpu",
        barebones=True,
    )
    torch.manual_seed(0)
    trainer.fit(Net(), Images(), loss=F.cross_entropy, optimizer=make_sgd)
    return exported(trainer)


@pytest.mark.slow
def test_configurations_policies_pipelines_and_algorithms_are_taken_as_they_are(
    tmp_path: Path,
) -> None:
    config = tmp_path / "zero.json"
    config.write_text(json.dumps(JSON))

    zero, sharded = (
        run_ranks(train, 2, name, str(config), str(tmp_path / "cache"), timeout_seconds=200.0)[0]
        for name in ("deepspeed", "fsdp")
    )

    assert zero.keys() == sharded.keys()
    for name, weights in zero.items():
        torch.testing.assert_close(weights, sharded[name], rtol=0, atol=1e-6)
