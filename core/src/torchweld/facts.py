"""Facts that only the model, the loss and the first batch can tell: the tokens decided at fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchweld import rng
from torchweld.errors import RunError
from torchweld.nesting import shapes, tensors

if TYPE_CHECKING:
    from torchweld.interfaces import Env, Prepared

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
    return {"inputs.4d": inputs is not None and inputs.dim() == 4}


# ---- the first batch, tried before step 1 --------------------------------------------------------


def try_first_batch(
    model: nn.Module,
    prepared: Prepared,
    batch: Any,
    forward: Callable[[Any], tuple[Any, Any]],
    loss: Callable[[Any, Any], Any],
) -> tuple[dict[str, bool], bool]:
    """Run the first batch through model and loss without training, and leave no trace.

    The forward is the training one, without gradients; buffers and random state are put back.

    Args:
        model: whose buffers the forward may change.
        forward: ``batch -> (outputs, targets)``.
        loss: of the run, without target transforms.

    Returns:
        The ``loss.*`` facts that could be found out, and whether the loss is a mapping.

    Raises:
        RunError: the loss fails on what the model gives, or is no scalar.
    """
    buffers = [(b, b.clone()) for b in model.buffers()]
    with torch.no_grad(), rng.preserved():
        prepared.mode(True)
        outputs, targets = forward(batch)
        try:
            value = loss(outputs, targets)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise RunError(_loss_failed(outputs, targets, error)) from error
        check_loss(value)
        facts = _soft_target_facts(outputs, targets, loss)
        for buffer, before in buffers:
            buffer.copy_(before)
    return facts, isinstance(value, Mapping)


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


def _loss_failed(outputs: Any, targets: Any, error: Exception) -> str:
    hint = ""
    target = next(iter(tensors(targets)), None)
    if target is not None and target.dim() == 2 and target.shape[1] == 1:
        hint = (
            "; targets of shape (N, 1): give class indices of shape (N,), e.g. targets.squeeze(1)"
        )
    elif target is not None and target.dim() == 0:
        hint = "; a target without a batch dimension"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the loss failed on the first batch: outputs {shapes(outputs)}, targets {shapes(targets)}: "
        f"{first}{hint}"
    )


def _soft_target_facts(outputs: Any, targets: Any, loss: Callable[..., Any]) -> dict[str, bool]:
    """Try the loss with one-hot targets, and with an answer that is certain and right."""
    if not _classifies(outputs, targets):
        return {"loss.accepts_soft_targets": False}
    one_hot = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
    try:
        soft = named_loss(loss(outputs, one_hot))
    except (RuntimeError, ValueError, TypeError, IndexError):
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
