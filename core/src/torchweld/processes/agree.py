"""Agreement before work: the ranks compare what each is about to do, and show the difference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torchweld.errors import PlanError, RanksDisagree

if TYPE_CHECKING:
    from torchweld.plan import Plan
    from torchweld.processes.ranks import Ranks

_SHOWN = 8  # differences printed; the first few say it all


def agree_on_plan(ranks: Ranks, plan: Plan) -> None:
    """Give this rank's plan, or its problems, to all; continue only where all are the same.

    Raises:
        PlanError: this plan has errors, or another rank's has; on all ranks.
        RanksDisagree: the plans differ (TW504); shows in what.
    """
    error = _error_of(plan)
    mine = json.dumps({"plan": dict(plan.summary()), "error": error})
    everyone = [json.loads(text) for text in ranks.exchange("plan", mine)]
    if error:
        plan.raise_for_problems()
    for rank, other in enumerate(everyone):
        if other["error"]:
            raise PlanError(f"rank {rank} cannot start:\n{other['error']}")
    _compare("plan", [other["plan"] for other in everyone])


def _error_of(plan: Plan) -> str:
    try:
        plan.raise_for_problems()
    except PlanError as error:
        return str(error)
    return ""


def agree_on(ranks: Ranks, what: str, mine: Mapping[str, str]) -> None:
    """Compare what the ranks are about to do beside the plan, as text by name.

    Without it a rank that validates, saves or ends at another step waits for the others for ever,
    and one with another learning rate trains other weights.

    Raises:
        RanksDisagree: shows in what.
    """
    everyone = [json.loads(text) for text in ranks.exchange(what, json.dumps(dict(mine)))]
    _compare(what, everyone)


def agree_on_model(ranks: Ranks, lines: Sequence[str], digest: str) -> None:
    """Compare names, shapes, dtypes and ``requires_grad`` of every tensor of the model.

    Without it ranks with equal shapes in another order train on, each name with other weights.

    Raises:
        RanksDisagree: shows the first tensors that differ.
    """
    digests = ranks.exchange("model", digest)
    if len(set(digests)) == 1:
        return
    everyone = [
        json.loads(text) for text in ranks.exchange("model in full", json.dumps(list(lines)))
    ]
    tables = [{f"tensor {i}": line for i, line in enumerate(each)} for each in everyone]
    _compare("model", tables)


def _compare(what: str, tables: Sequence[Mapping[str, str]]) -> None:
    for rank, table in enumerate(tables):
        differences = [
            f"{key}: {tables[0].get(key, 'nothing')} (rank 0), "
            f"{table.get(key, 'nothing')} (rank {rank})"
            for key in dict.fromkeys([*tables[0], *table])
            if tables[0].get(key) != table.get(key) and key != "digest"
        ]
        if differences:
            more = len(differences) - _SHOWN
            shown = [*differences[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
            raise RanksDisagree(
                f"TW504  rank {rank} has another {what} than rank 0:\n  "
                + "\n  ".join(shown)
                + "\n"
                "every process must run the same script with the same arguments"
            )


def smallest(ranks: Ranks, label: str, value: int | None) -> tuple[int | None, str]:
    """Agree on the smallest of the ranks' counts; the second value says so where they differ."""
    everyone = [json.loads(text) for text in ranks.exchange(label, json.dumps(value))]
    if len(set(everyone)) == 1:
        return value, ""
    known = [count for count in everyone if count is not None]
    if len(known) < len(everyone):
        return None, ""
    counts = ", ".join(map(str, everyone))
    return min(known), f"the processes have {counts} {label}: every one stops after {min(known)}"
