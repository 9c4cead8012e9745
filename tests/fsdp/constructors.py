"""Constructors that fill tensors in every way that people use."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from torchweld.testing.models import TinyGpt, batchnorm_convnet, mlp

Make = Callable[[], nn.Module]
Fill = Callable[[Any], None]  # of a module, whose attributes mypy does not know


def module(fill: Fill) -> Make:
    def make() -> nn.Module:
        made = nn.Module()
        fill(made)
        return made

    return make


class Applied(nn.Module):
    """Initialises its layers anew at the end, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 20, padding_idx=3)
        self.first = nn.Linear(20, 30)
        self.last = nn.Linear(30, 11, bias=False)
        self.register_buffer("mask", torch.triu(torch.ones(5, 5), 1).bool())
        self.register_buffer("positions", torch.arange(7)[None], persistent=False)
        self.apply(self._initialise)
        self.last.weight = self.embedding.weight = nn.Parameter(torch.randn(11, 20))
        self.embedding.weight.data[3].zero_()

    def _initialise(self, layer: nn.Module) -> None:
        if isinstance(layer, nn.Linear):
            layer.weight.data.normal_(0.0, 0.02)
        if isinstance(layer, nn.Embedding):
            layer.weight.data.normal_()
            layer.weight.data[3].zero_()


def every_init(made: Any) -> None:
    init = nn.init
    fills: list[Callable[[Tensor], Any]] = [
        *(init.uniform_, init.normal_, init.ones_, init.zeros_, init.eye_, init.xavier_uniform_),
        *(init.xavier_normal_, init.kaiming_uniform_, init.kaiming_normal_, init.trunc_normal_),
        *(init.orthogonal_, lambda tensor: init.sparse_(tensor, 0.3)),
        lambda tensor: init.trunc_normal_(tensor, a=-0.3, b=0.3),
    ]
    for number, fill in enumerate(fills):
        made.register_parameter(f"p{number}", nn.Parameter(torch.empty(9, 7)))
        fill(made.get_parameter(f"p{number}"))
    made.wide = nn.Parameter(init.orthogonal_(torch.empty(3, 9)))
    made.dirac = nn.Parameter(init.dirac_(torch.empty(4, 4, 3)))


def parts_of_tensors(made: Any) -> None:
    made.weight = nn.Parameter(torch.empty(4, 6))
    with torch.no_grad():
        made.weight.view(2, 2, 6)[1].normal_()
        made.weight[0].fill_(1)
        made.weight[1].copy_(made.weight[2])
        made.weight.t()[0] = torch.arange(4.0)
    first, second, third = torch.randn(6, 4).chunk(3)
    made.first, made.second = nn.Parameter(first), nn.Parameter(second)
    made.second.data.mul_(2)
    made.third = nn.Parameter(third.t())
    made.third.data[0] = 9
    resized = torch.randn(4)
    made.resized = nn.Parameter(resized.resize_(2))


def values_decide(made: Any) -> None:
    rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
    made.drops = nn.ModuleList(nn.Dropout(rate) for rate in rates)
    weights = torch.randn(50)
    weights[weights.abs() > 1] = 0
    made.kept = nn.Parameter(weights[weights != 0])
    made.scaled = nn.Parameter(weights / float(weights.norm()))
    made.layers = nn.ModuleList(nn.Linear(2, 2) for _ in torch.arange(3).tolist())


def data_from_python(made: Any) -> None:
    ones = torch.ones(3)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    made.a = nn.Parameter(torch.tensor([1.0, 2.0]))
    made.b = nn.Parameter(ones.new_tensor([3.0, 4.0]))
    made.c = nn.Parameter(torch.as_tensor([5.0, 6.0]))
    made.d = nn.Parameter(torch.FloatTensor([7.0, 8.0]))
    made.e = nn.Parameter(torch.from_numpy(array.copy()))
    made.f = nn.Linear(3, 2)
    made.f.weight.data.copy_(torch.from_numpy(array))
    array[:] = 0
    made.g = nn.Linear(3, 2)
    made.g.load_state_dict({"weight": torch.Tensor([[1, 2, 3], [4, 5, 6]]), "bias": ones.cpu()[:2]})


def own_generators(made: Any) -> None:
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(9)
    made.a = nn.Parameter(torch.randn(4, generator=generator))
    with torch.random.fork_rng():
        made.b = nn.Linear(3, 3)
    made.c = nn.Linear(3, 3)
    nn.init.normal_(made.c.bias, generator=generator)
    made.d = nn.Parameter(torch.poisson(torch.rand(100) * 9))
    made.e = nn.Parameter(torch.multinomial(torch.rand(9), 4).float())
    made.f = nn.Linear(3, 3)


def other_types(made: Any) -> None:
    phases = torch.polar(torch.ones(4), torch.arange(4.0))
    made.register_buffer("phases", phases)
    made.register_buffer("conjugated", phases.conj())
    made.short = nn.Linear(3, 4).to(torch.bfloat16)
    made.short.weight.data.normal_()
    made.conv = nn.Conv2d(3, 4, 3)
    made.conv.to(memory_format=torch.channels_last)
    nn.init.normal_(made.conv.weight)
    made.on_cpu = nn.Linear(3, 2).cpu()
    made.copy = copy.deepcopy(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)))


ZOO: dict[str, Make] = {
    "mlp": mlp,
    "convnet": batchnorm_convnet,
    "tiny_gpt": TinyGpt,
    "applied": Applied,
    "attention": lambda: nn.MultiheadAttention(16, 2, add_bias_kv=True),
    "transformer": lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True),
    "lstm": lambda: nn.LSTM(5, 6, 2),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 5)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 5)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "every_init": module(every_init),
    "parts_of_tensors": module(parts_of_tensors),
    "values_decide": module(values_decide),
    "data_from_python": module(data_from_python),
    "own_generators": module(own_generators),
    "other_types": module(other_types),
}


# ---- those that cannot be deferred ---------------------------------------------------------------


def makes_numpy(made: Any) -> None:
    made.a = nn.Linear(3, 3)
    made.b = nn.Parameter(torch.from_numpy(np.linalg.qr(made.a.weight.detach().numpy())[0]))
    made.c = nn.Parameter(torch.tensor([random.random(), np.random.rand()]))


def catches_the_failure(made: Any) -> None:
    made.a = nn.Linear(3, 3)
    try:
        made.a.weight.data.numpy()
    except TypeError:
        made.a.weight.data.zero_()


def keeps_a_parameter(made: Any) -> None:
    made.a = nn.Linear(3, 3)
    made.all = [made.a.weight]


def hides_a_tensor(made: Any) -> None:
    made.a = nn.Linear(3, 3)
    scale = torch.randn(3)
    made.scaled = lambda x: x * scale


def uses_singular_values(made: Any) -> None:
    made.a = nn.Parameter(torch.randn(9, 9))
    made.a.data.div_(torch.linalg.matrix_norm(made.a.data, 2))
