"""What a surgery changed: found by comparing the parts before and after, not by believing it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from torchweld.claims import Claims, relations
from torchweld.components import Chosen
from torchweld.errors import PluginError, SurgeryError
from torchweld.interfaces import Parts
from torchweld.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

_SLOTS_OF_FIELD: dict[str, frozenset[str]] = {
    "model": frozenset({"model.modules"}),
    "loss": frozenset({"loss.fn"}),
    "sample_transforms": frozenset({"batch.inputs"}),
    "input_transforms": frozenset({"batch.inputs"}),
    "batch_transforms": frozenset({"batch.inputs", "batch.targets"}),
    "target_transforms": frozenset({"batch.targets"}),
    "param_groups": frozenset({"optimizer"}),
    "optimizer": frozenset({"optimizer"}),
    "optimizer_wrappers": frozenset({"optimizer"}),
    "grad_transforms": frozenset({"grads"}),
    "after_step": frozenset({"weights.average", "optimizer"}),
}
"""Which slots allow a change of a field of Parts; a field that is missing here needs none."""


_ATTRIBUTES = "modules with other attributes or hooks"

Attributes = dict[str, Any]
"""What a module has beside parameters, buffers and submodules: settings and hooks."""


@dataclass(frozen=True)
class TensorState:
    """One parameter or buffer as it was; ``tensor`` is kept so that its id stays taken."""

    tensor: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    version: int
    requires_grad: bool


@dataclass(frozen=True)
class Snapshot:
    """The parts at one moment."""

    parts: Parts
    modules: Mapping[str, nn.Module]
    attributes: Mapping[str, Attributes]
    loss_attributes: Mapping[str, Attributes]
    tensors: Mapping[str, TensorState]


@dataclass(frozen=True)
class Difference:
    """What is different between two snapshots.

    Attributes:
        fields: names of the fields of Parts that changed; ``model`` for any change inside it.
        replaced: ``(old type, new type)`` to how often; modules inside a new one are left out.
        counts: further changes in words, each with its number.
    """

    fields: frozenset[str] = frozenset()
    replaced: Counter[tuple[str, str]] = field(default_factory=Counter)
    counts: tuple[tuple[str, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.fields)

    def __str__(self) -> str:
        lines = [f"{n} {old} -> {new}" for (old, new), n in sorted(self.replaced.items())]
        details = ", ".join(f"{n} {what}" for what, n in self.counts)
        if details:
            lines = [f"{', '.join(lines)} ({details})"] if lines else [details]
        others = sorted(self.fields - {"model"})
        return ", ".join([*lines, *(name.replace("_", " ") for name in others)]) or "nothing"


def snapshot(parts: Parts) -> Snapshot:
    """Note modules, parameters and buffers of the model, and every other part."""
    model, loss = parts.model, parts.loss
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return Snapshot(
        parts,
        dict(model.named_modules()),
        {name: _attributes(module) for name, module in model.named_modules()},
        {n: _attributes(m) for n, m in loss.named_modules()} if isinstance(loss, nn.Module) else {},
        {n: _state(t) for n, t in named},
    )


def _attributes(module: nn.Module) -> Attributes:
    """Containers are copied, so that a change inside is seen; the mode is core's to set."""
    elsewhere = {"_parameters", "_buffers", "_modules", "training"}
    return {n: _copied(v) for n, v in vars(module).items() if n not in elsewhere}


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value.values())  # the keys of hooks are numbers that say nothing
    return tuple(value) if isinstance(value, (list, set)) else value


def _state(tensor: Tensor) -> TensorState:
    return TensorState(
        tensor,
        tuple(tensor.shape),
        tensor.stride(),
        str(tensor.dtype),
        tensor._version,
        tensor.requires_grad,
    )


def difference(before: Snapshot, after: Snapshot) -> Difference:
    """Compare two snapshots; a value changed through ``.data`` stays invisible."""
    replaced, added = _module_changes(before.modules, after.modules)
    counts = added + Counter(dict(_tensor_changes(before.tensors, after.tensors)))
    kept = [n for n, m in after.modules.items() if before.modules.get(n) is m]
    counts += Counter({_ATTRIBUTES: _num_different(kept, before.attributes, after.attributes)})
    changed = {
        f.name
        for f in fields(Parts)
        if f.name != "model"
        and _differs(getattr(before.parts, f.name), getattr(after.parts, f.name))
    }
    if _num_different(before.loss_attributes, before.loss_attributes, after.loss_attributes):
        changed.add("loss")
    if replaced or counts:
        changed.add("model")
    return Difference(frozenset(changed), replaced, tuple(sorted(counts.items())))


def _num_different(
    names: Iterable[str], old: Mapping[str, Attributes], new: Mapping[str, Attributes]
) -> int:
    return sum(not _same_attributes(old[name], new.get(name, {})) for name in names)


def _same_attributes(old: Attributes, new: Attributes) -> bool:
    return old.keys() == new.keys() and all(_same(old[name], new[name]) for name in old)


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, tuple) and isinstance(new, tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    plain = (int, float, str, bool)
    return old is new or (isinstance(old, plain) and isinstance(new, plain) and old == new)


def _differs(old: Any, new: Any) -> bool:
    if isinstance(old, tuple) and isinstance(new, tuple):
        return len(old) != len(new) or any(a is not b for a, b in zip(old, new, strict=True))
    return old is not new


def _module_changes(
    old: Mapping[str, nn.Module], new: Mapping[str, nn.Module]
) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    replaced: Counter[tuple[str, str]] = Counter()
    other: Counter[str] = Counter()
    fresh: list[str] = []
    for name, module in new.items():
        if any(name.startswith(f"{prefix}." if prefix else "") for prefix in fresh):
            continue
        if name not in old:
            other[f"{type(module).__name__} added"] += 1
            fresh.append(name)
        elif module is not old[name]:
            replaced[type(old[name]).__name__, type(module).__name__] += 1
            fresh.append(name)
    removed = [n for n in old if n not in new and n.rpartition(".")[0] in (*new, "")]
    if removed and not fresh:
        other["modules removed"] += len(removed)
    return replaced, other


def _tensor_changes(
    old: Mapping[str, TensorState], new: Mapping[str, TensorState]
) -> Iterator[tuple[str, int]]:
    by_identity = {id(state.tensor) for state in old.values()}
    shared = [(old[name], state) for name, state in new.items() if name in old]
    same = [(a, b) for a, b in shared if a.tensor is b.tensor]
    fresh = [n for n, s in new.items() if n not in old and id(s.tensor) not in by_identity]
    moved = [n for n, s in new.items() if n not in old and id(s.tensor) in by_identity]
    gone = len(old.keys() - new.keys())
    found = {
        "tensors renamed": len(moved) + min(len(fresh), gone - len(moved)),
        "tensors added": max(0, len(fresh) - (gone - len(moved))),
        "tensors removed": max(0, gone - len(moved) - len(fresh)),
        "tensors replaced": sum(
            a.tensor is not b.tensor and a.stride == b.stride for a, b in shared
        ),
        "weights in another memory format": sum(a.stride != b.stride for a, b in shared),
        "tensors changed in place": sum(_changed_in_place(a, b) for a, b in same),
        "tensors frozen": sum(a.requires_grad and not b.requires_grad for a, b in shared),
        "tensors unfrozen": sum(b.requires_grad and not a.requires_grad for a, b in shared),
        "tensors of another dtype": sum(a.dtype != b.dtype for a, b in shared),
    }
    return ((what, n) for what, n in found.items() if n > 0)


def _changed_in_place(old: TensorState, new: TensorState) -> bool:
    # A new memory format is written through .data and is counted as such.
    return old.version != new.version and old.stride == new.stride and old.dtype == new.dtype


def check_claims(name: str, found: Difference, claims: Claims) -> list[Problem]:
    """Compare what changed with what was claimed: TW501 for nothing, TW502 for too much."""
    changes_nothing = claims.edits is not None and not relations(claims.edits) and bool(claims.sets)
    if not found and changes_nothing:
        return []  # it only asks core for a setting
    if not found:
        what = f"{name} changed nothing"
        why = "the model has nothing for it to act on, or it looked for something else"
        return [Problem("TW501", "warning", what, why, f"leave {name} out", (name,))]
    allowed = claimed_slots(claims)
    excess = sorted(
        part
        for part in found.fields
        if part in _SLOTS_OF_FIELD and not _SLOTS_OF_FIELD[part] & allowed
    )
    return [_beyond_claims(name, part, found) for part in excess]


def claimed_slots(claims: Claims) -> frozenset[str]:
    """The slots that a surgery may change."""
    edits = relations(("model.modules",) if claims.edits is None else claims.edits)
    return frozenset(rel.target for rel in (*edits, *relations(claims.owns or ())))


def _beyond_claims(name: str, part: str, found: Difference) -> Problem:
    slots = sorted(_SLOTS_OF_FIELD[part])
    return Problem(
        "TW502",
        "error",
        f"{name} changed {part!r}, which it does not claim ({found})",
        f"a change there needs the slot {' or '.join(slots)}, and the other choices were checked "
        "without it",
        f"state edits={slots[:1]} in its claims; your own function has them as Component({name!r}, "
        f"'…', build=lambda: function, claims=Claims(edits={slots[:1]}))",
        (name,),
    )


def operate(chosen: Chosen, surgery: Any, parts: Parts) -> Parts:
    """Apply one surgery.

    Raises:
        PluginError: it raised, or returned something else than Parts.
    """
    act = getattr(surgery, "apply", surgery)
    try:
        result = act(parts)
    except Exception as error:
        raise PluginError(f"surgery {chosen.name!r} failed: {_who(chosen)}{error!r}") from error
    if not isinstance(result, Parts):
        raise PluginError(
            f"surgery {chosen.name!r} returned {type(result).__name__}, not Parts: {_who(chosen)}"
            "a surgery takes Parts and returns Parts (dataclasses.replace(parts, model=…))"
        )
    wrong = _wrong_part(result)
    if wrong:
        raise PluginError(f"surgery {chosen.name!r} made Parts of which {wrong} {_who(chosen)}")
    return result


def _wrong_part(parts: Parts) -> str:
    if not isinstance(parts.model, nn.Module):
        return f"model is a {type(parts.model).__name__}, not an nn.Module"
    for part in fields(Parts):
        value = getattr(parts, part.name)
        if part.default == () and not (isinstance(value, tuple) and all(map(_can_act, value))):
            return f"{part.name} is {value!r}, not a tuple of functions"
    return ""


def _can_act(item: Any) -> bool:
    return callable(item) or hasattr(item, "bind") or hasattr(item, "at")


def _who(chosen: Chosen) -> str:
    origin = chosen.origin
    return f"({origin.distribution} {origin.version}) " if origin.distribution else ""


@dataclass(frozen=True)
class Operated:
    """One surgery that was done, and what it changed."""

    chosen: Chosen
    found: Difference

    def __str__(self) -> str:
        return f"{self.chosen.name}: {self.found}"


def raise_beyond_claims(problems: Sequence[Problem]) -> None:
    """Raise what the claims do not cover, unless the user allowed it.

    Args:
        problems: with the severities that the user asked for.

    Raises:
        SurgeryError: with all errors in the message.
    """
    errors = [p for p in problems if p.severity == "error"]
    if errors:
        lines = [f"{p.code}  {p.what}\n       {p.why}\n       {p.fix}" for p in errors]
        raise SurgeryError("\n".join(lines))
