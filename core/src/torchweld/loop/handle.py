"""One of the run's models, as the own loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torchweld.model.methods import in_place_of_forward, method_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from torchweld.interfaces import Prepared

NOT_THE_RUNS_MODEL = (
    "the loss was made without run.model(…): the module itself, called in its place, knows nothing "
    "of the strategy and the precision, so that processes would drift apart without a word"
)


class Handle:
    """Calling it is the prepared forward: in evaluation the one for evaluation.

    Where that is the module itself, calling this calls the module at once: ``__call__`` is found by
    C code, and costs no Python call a batch.

    Attributes:
        others: the other models of the run.
        used: whether it was called since somebody set this to False; not kept where the prepared
            forward is the module itself, so that it makes no difference.
        backward: of the run, for this model; bound when there is a run.
        step: likewise.
    """

    backward: Callable[[Tensor], None]
    step: Callable[[], None]

    def __init__(self, prepared: Prepared, model: nn.Module) -> None:
        self._prepared, self._model = prepared, model
        self.others: Sequence[Handle] = ()
        self.used = False
        self._use(prepared.forward)

    __call__ = property(attrgetter("_call"), doc="The forward of the mode that the model is in.")

    def _use(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._call = self._noted if forward is not self._model else forward

    def _noted(self, *args: Any, **kwargs: Any) -> Any:
        self.used = True
        return self._forward(*args, **kwargs)

    def mark_forward_method(self, name: str) -> Callable[..., Any]:
        """Return the model's method ``name`` as something that runs under the strategy.

        Called on the module itself it would not: strategy and precision act where the module is
        called. So the module is called here, with this method in the place of ``forward``.

        Raises:
            InvalidArgument: the model has no such method.
        """
        method = method_of(self._model, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with in_place_of_forward(self._model, method):
                return self(*args, **kwargs)

        return call

    def mode(self, train: bool) -> None:
        """Switch between training and evaluation; every rank must call it."""
        self._prepared.mode(train)
        self._use(self._prepared.forward if train else self._prepared.evaluate)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer whose ``param_groups`` decide the next step."""
        return self._prepared.optimizer

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Freeze the other models of this run meanwhile: forward and backward belong inside.

        Gradients flow through the others, and none is left in them or exchanged for them.
        """
        with ExitStack() as stack:
            for other in self.others:
                stack.enter_context(other.frozen())
            yield

    def frozen(self) -> AbstractContextManager[None]:
        """Let no parameter of this model take a gradient meanwhile."""
        return self._prepared.frozen()

    def named_parameters(self) -> Iterable[tuple[str, Any]]:
        """Canonical names and parameters, as the strategy holds them."""
        return self._prepared.named_parameters()

    def bytes_per_rank(self) -> Mapping[str, int]:
        """Bytes that this rank holds now: of ``parameters``, ``optimizer`` and ``gradients``."""
        return self._prepared.bytes_per_rank()
