"""The words that claims are made of: slots, tokens and the settings that a component may ask for.

The list is closed, so that a typo is found and strangers mean the same thing by the same word. A
plugin may add words of its own under its own prefix, ``"lora:adapters"``; core then only compares
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal

from torchweld.components import Settings

Source = Literal["strategy", "component", "run", "fit"]


@dataclass(frozen=True)
class Slot:
    """A part of the run that components take over or change.

    Attributes:
        name: what claims write.
        exclusive: at most one component may own it.
        edits: when others may edit it, seen from its owner.
        why: the reason it exists, printed to users.
    """

    name: str
    exclusive: bool
    edits: Literal["before", "after", "forbidden", "free"]
    why: str


@dataclass(frozen=True)
class Token:
    """A fact about the run. Three-valued: it holds, it does not, or nobody can know yet.

    Attributes:
        name: what claims write.
        source: who decides it. ``strategy`` and ``component`` are known while planning, ``run``
            after the launch (or from the settings), ``fit`` from model, loss and first batch.
        why: the reason it exists, printed to users.
        holds: a clause for the fact.
        fails: a clause for its opposite.
        stronger: a token that means at least as much; whoever provides that provides this.
    """

    name: str
    source: Source
    why: str
    holds: str
    fails: str
    stronger: str = ""


_SLOTS = (
    Slot(
        "model.modules",
        exclusive=True,
        edits="forbidden",
        why="layers can be replaced only while nobody has sharded or wrapped them",
    ),
    Slot(
        "engine",
        exclusive=True,
        edits="forbidden",
        why="one component decides where the parameters live and how gradients are exchanged, "
        "scaled, clipped and applied",
    ),
    Slot(
        "precision",
        exclusive=True,
        edits="forbidden",
        why="casting twice costs time and rounds twice",
    ),
    Slot(
        "optimizer",
        exclusive=True,
        edits="before",
        why="the optimizer is made once, over the parameters that really train",
    ),
    Slot(
        "grads",
        exclusive=False,
        # What edits them runs between backward and step, whichever phase put it there.
        edits="free",
        why="gradients are complete only between backward and step",
    ),
    Slot(
        "loss.fn",
        exclusive=False,
        edits="free",
        why="it says what is minimised",
    ),
    Slot(
        "batch.inputs",
        exclusive=False,
        edits="free",
        why="these are the tensors that the model sees",
    ),
    Slot(
        "batch.targets",
        exclusive=False,
        edits="free",
        why="these are the tensors that the loss sees",
    ),
    Slot(
        "data.loader",
        exclusive=True,
        edits="after",
        why="one loader yields the batches of a split",
    ),
    Slot(
        "weights.average",
        exclusive=True,
        edits="free",
        why="evaluation can use one averaged copy of the weights",
    ),
)

_STRATEGY_TOKENS = (
    Token(
        "params.local",
        "strategy",
        "an average of the weights reads them between two steps",
        "a process can read its parameters between two steps",
        "a process cannot read its parameters between two steps",
    ),
    Token(
        "params.writable",
        "strategy",
        "a method that changes weights itself must reach the copy that is stepped",
        "what is written into a parameter between two steps stays",
        "what is written into a parameter between two steps is lost",
    ),
    Token(
        "params.strided",
        "strategy",
        "a memory format is a property of each parameter's strides",
        "parameters keep their strides",
        "parameters lose their strides",
    ),
    Token(
        "params.may_freeze",
        "strategy",
        "freezing layers during training changes which gradients exist",
        "a parameter may be frozen during training",
        "a parameter may not be frozen during training",
    ),
    Token(
        "params.may_unfreeze",
        "strategy",
        "a parameter that becomes trainable later needs its gradient exchanged too",
        "a frozen parameter may become trainable during training",
        "a frozen parameter may not become trainable during training",
    ),
    Token(
        "params.deepcopy",
        "strategy",
        "some averages keep a deep copy of the model",
        "the prepared model can be deep-copied",
        "the prepared model cannot be deep-copied",
    ),
    Token(
        "grads.elementwise",
        "strategy",
        "a method that looks at single gradients needs finished ones",
        "each process holds the finished gradient of what it holds",
        "a process does not hold the finished gradient of what it holds",
    ),
    Token(
        "grads.stepped",
        "strategy",
        "a method that changes single gradients must reach those that are stepped",
        "each process holds the finished gradient of what it steps",
        "a process does not hold the finished gradient of what it steps",
        stronger="grads.elementwise",
    ),
    Token(
        "grads.whole",
        "strategy",
        "a norm of one parameter's gradient needs all of it",
        "each process holds whole gradients",
        "a process does not hold whole gradients",
    ),
    Token(
        "grads.stepped_whole",
        "strategy",
        "a norm that decides about the step of a parameter needs all of its gradient",
        "each process steps whole parameters, and holds their whole gradients",
        "a process does not hold whole gradients of what it steps",
        stronger="grads.whole",
    ),
    Token(
        "step.closure",
        "strategy",
        "some optimizers evaluate the loss more than once a step",
        "the optimizer step takes a closure",
        "the optimizer step takes no closure",
    ),
    Token(
        "graph.per_rank",
        "strategy",
        "a random graph differs between processes, and a collective waits for all of them",
        "processes may skip different layers",
        "processes may not skip different layers",
    ),
    Token(
        "precision.autocast",
        "strategy",
        "code with fp32 buffers of its own breaks when parameters are cast",
        "parameters and buffers keep their dtype",
        "parameters or buffers are cast",
    ),
    Token(
        "precision.uniform",
        "strategy",
        "a layer that meets its own buffers needs them in the dtype of its weights",
        "parameters and buffers have one dtype",
        "parameters and buffers differ in dtype",
        stronger="precision.autocast",
    ),
)

_COMPONENT_TOKENS = (
    Token(
        "targets.soft",
        "component",
        "mixing targets that are mixed already trains on wrong ones",
        "targets are mixtures of classes",
        "targets are not mixed",
    ),
    Token(
        "targets.smoothed",
        "component",
        "smoothing must be the last change of the targets",
        "targets are smoothed",
        "targets are not smoothed",
    ),
    Token(
        "weights.replaced",
        "component",
        "what was done to a layer is lost when the layer is replaced",
        "layers with weights are replaced",
        "no layer with weights is replaced",
    ),
    Token(
        "params.freeze_midrun",
        "component",
        "a strategy must expect that gradients disappear",
        "parameters get frozen during training",
        "no parameter gets frozen during training",
    ),
    Token(
        "graph.random",
        "component",
        "a strategy must expect that a step leaves parameters unused",
        "layers are skipped at random, differently on every process",
        "no layer is skipped at random",
    ),
    Token(
        "loader.torch",
        "component",
        "some transforms put themselves into a torch Dataset",
        "batches come from a torch DataLoader",
        "batches do not come from a torch DataLoader",
    ),
    Token(
        "loader.resizes",
        "component",
        "two resolution schedules work against each other",
        "the loader changes the resolution during training",
        "the loader keeps the resolution",
    ),
)

_RUN_TOKENS = (
    Token(
        "world>1",
        "run",
        "several processes need a strategy that keeps them together",
        "there are several processes",
        "there is one process",
    ),
    Token(
        "precision.fp16",
        "run",
        "fp16 scales the loss and may skip a step",
        "the precision is fp16",
        "the precision is not fp16",
    ),
    Token(
        "precision.reduced",
        "run",
        "low-precision kernels need a reduced precision to act on",
        "the precision is reduced",
        "the precision is 32",
    ),
    Token(
        "compile",
        "run",
        "a compiled graph breaks or is made again where Python code changes shapes",
        "the model is compiled",
        "the model is not compiled",
    ),
    Token(
        "activation_checkpointing",
        "run",
        "a part of the model runs a second time in the backward pass",
        "activations are computed again in the backward pass",
        "activations are kept for the backward pass",
    ),
    Token(
        "device.cuda",
        "run",
        "some kernels exist for CUDA only",
        "training runs on CUDA",
        "training does not run on CUDA",
    ),
)

_FIT_TOKENS = (
    Token(
        "loss.visible",
        "fit",
        "targets can be changed only between the model and a loss that core calls",
        "core can see the loss",
        "core cannot see the loss: the model or step= computes it",
    ),
    Token(
        "loss.accepts_soft_targets",
        "fit",
        "soft targets are probabilities, which a loss over class indices cannot take",
        "the loss takes soft targets",
        "the loss takes class indices only",
    ),
    Token(
        "loss.smooths",
        "fit",
        "smoothing twice is silent and smooths too much",
        "the loss smooths labels itself",
        "the loss does not smooth labels itself",
    ),
    Token(
        "model.conv",
        "fit",
        "some surgeries act on convolutions only",
        "the model has convolutions",
        "the model has no convolutions",
    ),
    Token(
        "model.batchnorm",
        "fit",
        "BatchNorm keeps statistics of every forward pass, in fp32",
        "the model has BatchNorm layers",
        "the model has no BatchNorm layers",
    ),
    Token(
        "inputs.4d",
        "fit",
        "images are cut and resized along their last two dimensions",
        "inputs are 4-D",
        "inputs are not 4-D",
    ),
    Token(
        "targets.ignored",
        "fit",
        "a target that the loss is to ignore is no class, and cannot become a probability",
        "the first batch has targets below 0, which a loss ignores",
        "every target of the first batch is a class or a value",
    ),
)

SLOTS: Mapping[str, Slot] = MappingProxyType({slot.name: slot for slot in _SLOTS})
"""Every slot of core by its name."""

TOKENS: Mapping[str, Token] = MappingProxyType(
    {
        token.name: token
        for token in (*_STRATEGY_TOKENS, *_COMPONENT_TOKENS, *_RUN_TOKENS, *_FIT_TOKENS)
    }
)
"""Every token of core by its name."""

SETTINGS: tuple[str, ...] = tuple(field.name for field in fields(Settings))
"""The settings that ``Claims.sets`` may name."""


def find_slot(name: str) -> Slot | None:
    """The slot of this name, one under a plugin's prefix included; None for an unknown word."""
    if is_own_word(name):
        return Slot(name, exclusive=True, edits="free", why="a plugin defined it")
    return SLOTS.get(name)


def find_token(name: str) -> Token | None:
    """The token of this name, one under a plugin's prefix included; None for an unknown word."""
    if is_own_word(name):
        return Token(name, "component", "a plugin defined it", f"{name} holds", f"no {name}")
    return TOKENS.get(name)


def proofs(name: str) -> tuple[str, ...]:
    """The tokens of which one is enough: ``name`` itself, and the one that means more."""
    token = TOKENS.get(name)
    return (name, token.stronger) if token and token.stronger else (name,)


def is_own_word(name: str) -> bool:
    """Whether ``name`` is a plugin's own word, ``"<name>:word"``."""
    prefix, colon, word = name.partition(":")
    return bool(prefix and colon and word)
