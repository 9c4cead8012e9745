"""The words of claims: closed, explained, and open only under a plugin's own prefix."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest

from torchweld import Settings
from torchweld.vocabulary import (
    SETTINGS,
    SLOTS,
    TOKENS,
    Slot,
    Source,
    Token,
    find_slot,
    find_token,
)


def test_slots_are_those_of_the_design() -> None:
    assert set(SLOTS) == {
        "model.modules",
        "engine",
        "precision",
        "optimizer",
        "grads",
        "loss.fn",
        "batch.inputs",
        "batch.targets",
        "data.loader",
        "weights.average",
    }


def test_slots_with_one_owner() -> None:
    exclusive = {name for name, slot in SLOTS.items() if slot.exclusive}

    assert exclusive == {
        "model.modules",
        "engine",
        "precision",
        "optimizer",
        "data.loader",
        "weights.average",
    }


@pytest.mark.parametrize("word", [*SLOTS.values(), *TOKENS.values()], ids=lambda word: word.name)
def test_every_word_is_explained_in_one_clause(word: Slot | Token) -> None:
    texts = [word.why] if isinstance(word, Slot) else [word.why, word.holds, word.fails]

    for text in texts:
        assert 10 <= len(text) <= 120
        assert not text.endswith(".")
        assert text[0].islower() or text.startswith("BatchNorm")


def test_every_source_of_tokens_is_used() -> None:
    assert {token.source for token in TOKENS.values()} == set(get_args(Source))


def test_what_the_run_decides() -> None:
    run = {name for name, token in TOKENS.items() if token.source == "run"}

    assert run == {
        "world>1", "precision.fp16", "precision.reduced", "compile", "activation_checkpointing",
        "device.cuda",
    }  # fmt: skip


def test_no_word_is_both_a_slot_and_a_token() -> None:
    assert not set(SLOTS) & set(TOKENS)


def test_settings_that_can_be_asked_for_are_those_of_the_trainer() -> None:
    assert set(SETTINGS) == {field.name for field in fields(Settings)}


def test_unknown_words_are_none() -> None:
    assert find_slot("model.module") is None
    assert find_token("loss.smooth") is None


def test_a_plugin_has_words_under_its_own_prefix() -> None:
    slot, token = find_slot("lora:adapters"), find_token("lora:merged")

    assert slot is not None
    assert (slot.name, slot.exclusive, slot.edits) == ("lora:adapters", True, "free")
    assert token is not None
    assert (token.name, token.source) == ("lora:merged", "component")


@pytest.mark.parametrize("word", [":word", "lora:", ":"])
def test_a_prefix_and_a_word_are_needed(word: str) -> None:
    assert find_token(word) is None
