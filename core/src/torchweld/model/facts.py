"""Facts that only the model, the loss and the first batch can tell: the tokens decided at fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchweld import rng
from torchweld.errors import InvalidArgument, RunError
from torchweld.nesting import shapes, tensors

if TYPE_CHECKING:
    from torchweld.interfaces import Env, Parts

_INDEX_LOSSES = (F.nll_loss, F.multi_margin_loss)


def run_facts(env: Env) -> dict[str, bool]:
    """What the launch tells."""
    return {"world>1": env.world_size > 1, "device.cuda": env.device.type == "cuda"}


def model_facts(model: nn.Module) -> dict[str, bool]:
    """What the model's layers tell."""
    modules = list(model.modules())
    return {
        "model.conv": any(isinstance(m, nn.modules.conv._ConvNd) for m in modules),
        "model.batchnorm": any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules),
    }


def wants_channels_last(parts: Parts) -> bool:
    """Whether images are best made in the NHWC memory format: for the weights, or a transform."""
    asked = (getattr(change, "memory_format", None) for change in parts.input_transforms)
    return torch.channels_last in asked or _has_channels_last(parts.model)


def _has_channels_last(model: nn.Module) -> bool:
    """Whether the weights of a convolution have the NHWC memory format.

    Strides are looked at, not the surgery that made them: a user may have changed the model, too.
    """
    # A weight with a single channel, or of 1 x 1, is contiguous in both formats and tells nothing.
    return any(
        parameter.dim() == 4
        and not parameter.is_contiguous()
        and parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in model.parameters()
    )


def loss_facts(loss: Any, *, visible: bool) -> dict[str, bool]:
    """What the loss tells by itself; a loss nobody knows leaves tokens open for the first batch."""
    facts = {"loss.visible": visible}
    if not visible:
        return {**facts, "loss.accepts_soft_targets": False, "loss.smooths": False}
    smoothing = _keyword(loss, "label_smoothing")
    if smoothing is not None:
        facts["loss.smooths"] = smoothing > 0
    plain = loss.func if isinstance(loss, partial) else loss
    if isinstance(plain, nn.CrossEntropyLoss) or plain is F.cross_entropy:
        facts["loss.accepts_soft_targets"] = True
        facts.setdefault("loss.smooths", False)
    elif isinstance(plain, nn.NLLLoss) or plain in _INDEX_LOSSES:
        facts.update({"loss.accepts_soft_targets": False, "loss.smooths": False})
    return facts


def _keyword(loss: Any, name: str) -> Any:
    """A setting of a loss module, or of a ``functools.partial`` over a loss function."""
    if isinstance(loss, partial):
        return loss.keywords.get(name, _keyword(loss.func, name))
    return getattr(loss, name, None)


def batch_facts(batch: Any) -> dict[str, bool]:
    """What the first batch tells."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    inputs = next(iter(tensors(batch[0])), None) if pair else None
    targets = batch[1] if pair else None
    return {
        "inputs.4d": inputs is not None and inputs.dim() == 4,
        "targets.ignored": isinstance(targets, Tensor) and _has_negative_classes(targets),
    }


def _has_negative_classes(targets: Tensor) -> bool:
    """Whether some target is none of the classes, as ``ignore_index=-100``."""
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    return whole and targets.numel() > 0 and bool((targets < 0).any())


# ---- the first batch, tried before step 1 --------------------------------------------------------


def try_first_batch(
    model: nn.Module,
    batch: Any,
    forward: Callable[[Any], tuple[Any, Any]],
    loss: Callable[[Any, Any], Any],
    *,
    metrics: Mapping[str, Any] | None = None,
    asks_for_soft_targets: bool = False,
) -> tuple[dict[str, bool], bool]:
    """Run the first batch through model, loss and metrics without training, and leave no trace.

    The forward is the training one, without gradients; buffers and random state are put back.

    Args:
        model: whose buffers the forward may change.
        forward: ``batch -> (outputs, targets)``.
        loss: of the run, without target transforms.
        metrics: functions are called, objects with a state of their own are not.
        asks_for_soft_targets: whether anybody needs the ``loss.*`` facts; only then is the loss
            called with targets that are not the user's.

    Returns:
        The facts that could be found out, and whether the loss is a mapping.

    Raises:
        RunError: the loss or a metric fails on what the model gives, or is no scalar.
        InvalidArgument: a metric returns something else than ``(sum, count)``.
    """
    modules = [model, loss] if isinstance(loss, nn.Module) else [model]
    with torch.no_grad(), rng.preserved(), _buffers_kept(modules):
        outputs, targets = forward(batch)
        value = _call("the loss", loss, outputs, targets)
        check_loss(value)
        for name, metric in (metrics or {}).items():
            if not hasattr(metric, "update"):
                check_counts(name, _call(f"metric {name!r}", metric, outputs, targets))
        facts = _soft_target_facts(outputs, targets, loss) if asks_for_soft_targets else {}
    return facts, isinstance(value, Mapping)


@contextmanager
def _buffers_kept(roots: Sequence[nn.Module]) -> Iterator[None]:
    """Put every buffer back: the tensor, for code that assigns a new one, and what was in it."""
    before = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for root in roots
        for module in root.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in before:
            module._buffers[name] = buffer
            if buffer is not None and values is not None:
                buffer.copy_(values)


def _call(what: str, function: Callable[[Any, Any], Any], outputs: Any, targets: Any) -> Any:
    """Call a user's function; torch's warning of a wrong broadcast counts as a failure."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Using a target size")
            return function(outputs, targets)
    except (RuntimeError, ValueError, TypeError, IndexError, UserWarning) as error:
        raise RunError(_failed(what, outputs, targets, error)) from error


def check_counts(name: str, result: Any) -> None:
    """Refuse what a metric returned unless it is two numbers.

    Raises:
        InvalidArgument: names the metric and what it returned.
    """
    pair = isinstance(result, tuple) and len(result) == 2
    if not (pair and all(torch.as_tensor(number).dim() == 0 for number in result)):
        got = shapes(result) if isinstance(result, (tuple, Tensor)) else type(result).__name__
        raise InvalidArgument(
            f"metric {name!r} returned {got}: a metric is (outputs, targets) -> (sum, count), two "
            "numbers, so that ranks and batches add up exactly"
        )


def check_loss(value: Any) -> Tensor:
    """Return the scalar in what a loss returned: the value itself, or its ``"loss"``.

    Raises:
        RunError: no tensor, or more than one number.
    """
    loss = named_loss(value)
    if not isinstance(loss, Tensor):
        raise RunError(
            f"the loss returned {type(loss).__name__}: return a scalar tensor, or a mapping with "
            "'loss' and further scalars"
        )
    if loss.dim() != 0:
        raise RunError(
            f"the loss returned a tensor of shape {tuple(loss.shape)}: it has to be a scalar, the "
            "mean over the samples of the batch (reduction='mean', or .mean())"
        )
    return loss


def named_loss(value: Any) -> Any:
    """``value["loss"]``, ``value.loss`` or the value itself."""
    if isinstance(value, Mapping):
        if "loss" not in value:
            raise RunError(f"the loss returned a mapping without 'loss' (it has {sorted(value)})")
        return value["loss"]
    return value if isinstance(value, Tensor) else getattr(value, "loss", value)


def _failed(what: str, outputs: Any, targets: Any, error: Exception) -> str:
    hint = ""
    target = next(iter(tensors(targets)), None)
    if target is not None and target.dim() == 2 and target.shape[1] == 1:
        hint = "; targets of shape (N, 1): give them as shape (N,), e.g. targets.squeeze(1)"
    elif target is not None and target.dim() == 0:
        hint = "; a target without a batch dimension"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{what} failed on the first batch: outputs {shapes(outputs)}, targets {shapes(targets)}: "
        f"{first}{hint}"
    )


def _soft_target_facts(outputs: Any, targets: Any, loss: Callable[..., Any]) -> dict[str, bool]:
    """Try the loss with one-hot targets, and with an answer that is certain and right."""
    if not _classifies(outputs, targets):
        return {"loss.accepts_soft_targets": False}
    one_hot = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
    try:
        soft = named_loss(loss(outputs, one_hot))
    except Exception:  # noqa: BLE001 - the user's loss, with targets that it was not made for
        return {"loss.accepts_soft_targets": False}
    certain = one_hot * 40.0  # cross entropy of the right answer: 4e-18; smoothed by s: 36 s
    smooths = float(named_loss(loss(certain, targets))) > 0.3
    return {"loss.accepts_soft_targets": bool(torch.isfinite(soft).all()), "loss.smooths": smooths}


def _classifies(outputs: Any, targets: Any) -> bool:
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.dim() == 2
        and targets.dim() == 1
        and not targets.is_floating_point()
        and bool((targets >= 0).all())
        and bool((targets < outputs.shape[1]).all())
    )
