"""Peak memory of a step with and without activation checkpointing, on a CPU.

Every way runs in a process of its own: ``python benchmarks/memory.py``. What is printed is the
peak of the process (``VmHWM``), how much of it training added, and the losses, which are equal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from typing import Any

WAYS: dict[str, dict[str, Any]] = {
    "off": {},
    "every unit": {"activation_checkpointing": True},
    "every other unit": {"activation_checkpointing": {"every": 2}},
}
WIDTH, DEPTH, CONTEXT, BATCH, STEPS, VOCABULARY = 128, 8, 256, 8, 2, 256


def measure(way: str) -> dict[str, Any]:
    """Train a small GPT in this process."""
    import resource

    import torch
    import torch.nn.functional as F
    from torch.utils.data import TensorDataset

    from torchweld import Trainer, use

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True
    )

    class Gpt(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
            self.h = torch.nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
            self.head = torch.nn.Linear(WIDTH, VOCABULARY)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.h(self.embed(tokens)))
            return logits.transpose(1, 2)

    tokens = torch.randint(VOCABULARY, (BATCH * STEPS, CONTEXT + 1))
    data = TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    model = Gpt()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    losses: list[float] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        value = F.cross_entropy(outputs, targets)
        losses.append(value.item())
        return value

    trainer = Trainer(
        data=use("torch", batch_size=BATCH), max_epochs=1, barebones=True, seed=1, **WAYS[way]
    )
    trainer.fit(model, data, loss=loss, optimizer=partial(torch.optim.SGD, lr=0.1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - began
    return {"peak": peak, "added": peak - before, "losses": losses, "seconds": seconds}


def main() -> None:
    """Measure every way, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=list(WAYS))
    way = parser.parse_args().way
    if way is not None:
        print(json.dumps(measure(way)))
        return
    print("| activation checkpointing | peak MiB | added by training | losses |")
    print("|---|---|---|---|")
    for name in WAYS:
        command = [sys.executable, __file__, "--way", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        losses = ", ".join(f"{value:.9f}" for value in found["losses"])
        print(f"| {name} | {found['peak']:.0f} | {found['added']:.0f} | {losses} |", flush=True)


if __name__ == "__main__":
    main()
