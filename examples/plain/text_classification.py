"""Tell from which package of Python's standard library a paragraph of source text is.

A small transformer on mapping batches; AdamW without weight decay on norms and biases.
"""

from __future__ import annotations

import argparse
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
WORDS = 2000  # in the vocabulary, with 0 for padding and 1 for every other word
LENGTH = 48  # words of a paragraph that the model sees

Paragraph = tuple[list[int], int]


class Paragraphs(Dataset[Paragraph]):
    """Word numbers and package of each paragraph."""

    def __init__(self, paragraphs: Sequence[Paragraph]) -> None:
        self.paragraphs = paragraphs

    def __len__(self) -> int:
        return len(self.paragraphs)

    def __getitem__(self, index: int) -> Paragraph:
        return self.paragraphs[index]


def load_data() -> tuple[Paragraphs, Paragraphs]:
    """2 400 paragraphs, and 600 for validation."""
    texts: list[tuple[list[str], int]] = []
    for label, package in enumerate(PACKAGES):
        for path in sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py")):
            for paragraph in path.read_text("utf-8").split("\n\n"):
                words = re.findall(r"[A-Za-z_]+|[^\sA-Za-z_]", paragraph)[:LENGTH]
                if len(words) > 8:
                    texts.append((words, label))
    random.Random(0).shuffle(texts)
    counted = Counter(word for words, _ in texts[:2400] for word in words)
    numbers = {word: i for i, (word, _) in enumerate(counted.most_common(WORDS - 2), start=2)}
    data = [([numbers.get(word, 1) for word in words], label) for words, label in texts[:3000]]
    return Paragraphs(data[:2400]), Paragraphs(data[2400:])


def collate(paragraphs: Sequence[Paragraph]) -> dict[str, Tensor]:
    """Paragraphs of different lengths as one batch, padded with 0 on the right."""
    longest = max(len(words) for words, _ in paragraphs)
    padded = [words + [0] * (longest - len(words)) for words, _ in paragraphs]
    tokens = torch.tensor(padded)
    labels = torch.tensor([label for _, label in paragraphs])
    return {"input_ids": tokens, "attention_mask": tokens != 0, "labels": labels}


class Classifier(nn.Module):
    """A transformer encoder; the mean over the words decides."""

    def __init__(self, width: int = 48, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=0)
        self.places = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(PACKAGES))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Word numbers ``(batch, time)`` to a loss and logits ``(batch, packages)``."""
        x = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x, src_key_padding_mask=~attention_mask)
        seen = attention_mask.unsqueeze(-1)
        logits = self.head((self.norm(x) * seen).sum(1) / seen.sum(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def warmup_linear(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Up in the first tenth of the run, then down to nothing."""
    return LambdaLR(optimizer, lambda step: min(10 * (step + 1), total_steps - step) / total_steps)


def main() -> None:
    """Train, evaluate, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()

    torch.manual_seed(0)
    train, val = load_data()
    model = Classifier()
    train_loader = DataLoader(train, 32, shuffle=True, collate_fn=collate)
    val_loader = DataLoader(val, 100, collate_fn=collate)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=2e-3, weight_decay=0.1)
    scheduler = warmup_linear(optimizer, options.epochs * len(train_loader))

    for _ in range(options.epochs):
        model.train()
        for batch in train_loader:
            loss = model(**batch)["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    model.eval()
    right = 0
    with torch.no_grad():
        for batch in val_loader:
            right += (model(**batch)["logits"].argmax(1) == batch["labels"]).sum().item()
    print(f"accuracy: {right / len(val):.4f}")
    save_file(model.state_dict(), "text_classification.safetensors")


if __name__ == "__main__":
    main()
