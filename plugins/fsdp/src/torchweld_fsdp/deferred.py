"""Build a model without its values, and give each tensor the values of an eager build later.

The constructor runs on the meta device while every operation is recorded. Only operations that draw
random numbers are done for real, one at a time and thrown away, which moves the generators as an
eager build would. A tensor's values are then computed from the operations that it depends on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torchweld import rng
from torchweld.errors import InvalidArgument
from torchweld_fsdp.recording import DataKept, NotDeferrable, Recorder, first_sentence, is_meta
from torchweld_fsdp.tape import Tape

# Not plain attributes; a recurrent layer renews its flat weights when a parameter is set.
_REGISTRIES = {"_parameters", "_buffers", "_modules", "_flat_weights"}


class Deferred:
    """The values of the tensors that :func:`defer` left out."""

    def __init__(self, tape: Tape, versions: Mapping[int, int]) -> None:
        self._tape = tape
        self._versions = versions

    def knows(self, tensor: Tensor) -> bool:
        """Whether the constructor left ``tensor`` without values and nobody changed it since."""
        return is_meta(tensor) and self._tape.knows(tensor) and not self._changed(tensor)

    def materialise(self, tensor: Tensor) -> Tensor:
        """Return a CPU tensor with the values, shape, strides and dtype of an eager build.

        Neither ``tensor`` nor any random state is changed, so the order of calls does not matter. A
        parameter with two names is to be asked for once and put at both.

        Args:
            tensor: a parameter or buffer of the model; one that has values is returned itself.

        Raises:
            InvalidArgument: ``tensor`` is on the meta device and was not made by the constructor,
                or was changed since; a change through ``.data`` goes unnoticed and is lost.
        """
        if not is_meta(tensor):
            return tensor
        shape = tuple(tensor.shape)
        if not self._tape.knows(tensor):
            raise InvalidArgument(
                f"a tensor of shape {shape} on the meta device is not of the model that was "
                "deferred: materialise its parameters and buffers before they are replaced"
            )
        if self._changed(tensor):
            raise InvalidArgument(
                f"a tensor of shape {shape} was changed after its constructor while it had no "
                "values: change it in the constructor, or build the whole model first"
            )
        return self._tape.value(tensor)

    def fill(self, module: nn.Module) -> None:
        """Put tensors with values in the place of those of ``module`` and its children without.

        Names that are one parameter stay one, if all of them are in ``module``; attributes that
        were put on a parameter are kept.
        """
        filled: dict[Tensor, Tensor] = {}
        for inner in module.modules():
            for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
                if tensor is not None and is_meta(tensor):
                    if tensor not in filled:
                        filled[tensor] = in_place_of(tensor, self.materialise(tensor))
                    setattr(inner, name, filled[tensor])

    def _changed(self, tensor: Tensor) -> bool:
        return self._versions.get(id(tensor), tensor._version) != tensor._version


def defer(make: Callable[[], nn.Module]) -> tuple[nn.Module, Deferred | None, str]:
    """Build a model whose tensors get their values later, or at once where that cannot be.

    Python's, numpy's and torch's random states are afterwards as ``make()`` alone would leave them.
    Where the constructor needs what a tensor without memory does not have (numpy arrays of it, its
    address), ``make`` runs a second time: what it does besides building then happens twice.

    A constructor that decides by ``tensor.device`` decides as for the meta device; ``is_meta`` is
    False while it runs, because torch 2.13 leaves out initialisations where it is True.

    Args:
        make: builds the model on the CPU, from torch's default dtype and random state.

    Returns:
        The model; what gives its tensors their values, or None where they have them; and in that
        case the reason, a sentence.
    """
    device = torch.empty(0).device  # get_default_device of torch 2.7 fails once it was reset
    if device.type != "cpu":
        return make(), None, f"the model was built at once, as the default device is {device}"
    states = rng.capture()
    functions, recorder = DataKept(), Recorder()
    try:
        with torch.device("meta"), functions, recorder:
            model = make()
        versions = _settle(model, recorder, functions.failure)
    except Exception as error:  # noqa: BLE001 - the user's constructor; its own fault comes again
        reason = first_sentence(error)
    else:
        return model, Deferred(recorder.tape, versions), ""
    rng.restore(states)
    recorder.restore_generators()
    return make(), None, f"the model was built at once, not tensor by tensor ({reason})"


# ---- when it has run -----------------------------------------------------------------------------


def _settle(model: nn.Module, recorder: Recorder, failure: str) -> dict[int, int]:
    """Give values to tensors that are no parameters or buffers; refuse those out of reach.

    Returns:
        How often each parameter and buffer has been changed so far, by its id.
    """
    if failure:
        raise NotDeferrable(failure)
    tensors = [*model.parameters(), *model.buffers()]
    registered = {_identity(tensor) for tensor in tensors}
    for module in model.modules():
        _fill_attributes(module, registered, recorder)
    if _strays(recorder, registered):
        gc.collect()
    if _strays(recorder, registered):
        raise NotDeferrable("a tensor is kept outside of the modules")
    return {id(tensor): tensor._version for tensor in tensors}


def _fill_attributes(module: nn.Module, registered: set[int], recorder: Recorder) -> None:
    def with_values(tensor: Tensor) -> Tensor:
        if is_meta(tensor) and _identity(tensor) in registered:
            raise NotDeferrable("a parameter or buffer is also kept under a plain attribute")
        return recorder.value(tensor)

    attributes = vars(module)
    for name in attributes.keys() - _REGISTRIES:
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(attributes[name])):
            attributes[name] = tree_map_only(Tensor, with_values, attributes[name])


def _strays(recorder: Recorder, registered: set[int]) -> bool:
    """Whether tensors are still used that nobody would give values to."""
    alive = (ref() for ref in recorder.made)
    return any(tensor is not None and _identity(tensor) not in registered for tensor in alive)


def in_place_of(tensor: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` as what ``tensor`` is: a parameter of its class, with its attributes."""
    if isinstance(tensor, nn.Parameter):
        value = Tensor._make_subclass(type(tensor), value, tensor.requires_grad)
    vars(value).update(vars(tensor))
    return value


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
