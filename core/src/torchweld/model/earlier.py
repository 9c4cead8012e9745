"""What surgeries did to a model in earlier runs of a Trainer: none is done to it twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from torchweld.errors import SurgeryError


@dataclass
class _Record:
    """What was done to one module.

    Attributes:
        fields: name of a surgery to the fields of ``Parts`` that it changed.
        replaced_by: the surgery that made another module of this one, or "".
    """

    fields: dict[str, frozenset[str]] = field(default_factory=dict)
    replaced_by: str = ""


class EarlierSurgeries:
    """Remembers by module, as long as the module lives; held by a Trainer."""

    def __init__(self) -> None:
        self._records: WeakKeyDictionary[nn.Module, _Record] = WeakKeyDictionary()

    def is_done(self, model: nn.Module, name: str) -> bool:
        """Whether the surgery ``name`` was done to ``model`` in an earlier run, and is to be left.

        One that only changed the loss or the batches is done in each run.

        Raises:
            SurgeryError: it cannot be told apart what of it would be done twice.
        """
        records = [self._records[root] for root in _roots(model) if root in self._records]
        if not records:
            return False
        gone = next((record.replaced_by for record in records if record.replaced_by), "")
        if gone:
            raise SurgeryError(
                f"surgery {gone!r} made another module of this model in an earlier run of this "
                "Trainer, which is the one that was trained: give a newly built model, or a "
                "function that builds one"
            )
        done = [record.fields.get(name, frozenset()) for record in records]
        changed = frozenset[str]().union(*done)
        if "model" not in changed:
            return False
        beside = sorted(changed - {"model"})
        if beside or len(records) < len(_roots(model)):
            why = f"also changed {', '.join(beside)}" if beside else "is still due for another one"
            raise SurgeryError(
                f"surgery {name!r} changed this model in an earlier run of this Trainer and {why}, "
                "so that it can be neither left out nor done again: give a newly built model, or a "
                "function that builds one"
            )
        return True

    def note(self, name: str, fields: frozenset[str], before: nn.Module, after: nn.Module) -> None:
        """Remember that ``name`` made ``after`` of ``before``, which may be the same module."""
        new = {id(root) for root in _roots(after)}
        for root in (*_roots(before), *_roots(after)):
            record = self._records.setdefault(root, _Record())
            record.fields[name] = record.fields.get(name, frozenset()) | fields
            if id(root) not in new:
                record.replaced_by = name


def _roots(model: nn.Module) -> Sequence[nn.Module]:
    """The user's own modules; several models are the children of a module of ours."""
    return list(model.children()) if type(model) is nn.ModuleDict else [model]
