"""Numbers that an adopted algorithm cannot work with: of its own arguments, and of this run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torchweld.problems import Problem
from torchweld_composer.adopt import Adopted, algorithm_of
from torchweld_composer.known import known
from torchweld_composer.options import is_int, is_number

if TYPE_CHECKING:
    from torchweld.interfaces import RunFacts
    from torchweld.plan import Plan

Finding = tuple[str, str]
"""What is wrong, and what to do."""

POSITIVE = "a number > 0"
FRACTION = "a number in [0, 1]"
COUNT = "an integer >= 1"

RANGES: dict[str, tuple[tuple[str, str], ...]] = {
    "BlurPool": (("min_channels", COUNT),),
    "ColOut": (("p_row", "a number in [0, 1)"), ("p_col", "a number in [0, 1)")),
    "CutMix": (("alpha", POSITIVE),),
    "CutOut": (("num_holes", COUNT), ("length", POSITIVE)),
    "EMA": (("smoothing", FRACTION),),
    "GhostBatchNorm": (("ghost_batch_size", COUNT),),
    "GradientClipping": (("clipping_threshold", POSITIVE),),
    "LabelSmoothing": (("smoothing", FRACTION),),
    "LayerFreezing": (("freeze_start", "a number in [0, 1)"), ("freeze_level", FRACTION)),
    "MixUp": (("alpha", POSITIVE),),
    "ProgressiveResizing": (("initial_scale", "a number in (0, 1]"), ("size_increment", COUNT)),
    "SAM": (("rho", POSITIVE), ("interval", COUNT)),
    "SelectiveBackprop": (("keep", "a number in (0, 1]"), ("interrupt", "an integer >= 0")),
    "SqueezeExcite": (("latent_channels", POSITIVE), ("min_channels", COUNT)),
}
"""Class to its arguments and what they have to be; Composer checks none of these, or too late."""

_HOLDS: dict[str, Callable[[Any], bool]] = {
    POSITIVE: lambda v: is_number(v) and v > 0,
    FRACTION: lambda v: is_number(v) and 0 <= v <= 1,
    COUNT: lambda v: is_int(v) and v >= 1,
    "an integer >= 0": lambda v: is_int(v) and v >= 0,
    "a number in [0, 1)": lambda v: is_number(v) and 0 <= v < 1,
    "a number in (0, 1]": lambda v: is_number(v) and 0 < v <= 1,
}


def find_problems(plan: Plan, facts: RunFacts) -> list[Problem]:
    """The problems of every adopted algorithm in ``plan``."""
    adopted = [algorithm_of(chosen.component) for chosen in plan.order]
    return [problem for one in adopted if one for problem in _problems(one, facts)]


def _problems(adopted: Adopted, facts: RunFacts) -> Iterator[Problem]:
    algorithm, name = adopted.algorithm, adopted.name
    if known(algorithm) is None:
        return
    for what, fix in _outside_ranges(algorithm):
        yield Problem("TW601", "error", f"{name}: {what}", fix=fix, who=(name,))
    check = _CHECKS.get(type(algorithm).__name__)
    for what, fix in check(algorithm, facts) if check else ():
        yield Problem("TW602", "error", f"{name}: {what}", fix=fix, who=(name,))
    if type(algorithm).__name__ == "EMA":
        yield from _long_half_life(algorithm, name, facts)


def _outside_ranges(algorithm: Any) -> Iterator[Finding]:
    for argument, expected in RANGES.get(type(algorithm).__name__, ()):
        value = getattr(algorithm, argument)
        if not _HOLDS[expected](value):
            yield f"{argument}={value!r} is not {expected}", f"give {expected} for {argument}"


def _clipping(algorithm: Any, _facts: RunFacts) -> Iterator[Finding]:
    kinds = ("norm", "value", "adaptive")
    if algorithm.clipping_type not in kinds:
        listed = ", ".join(map(repr, kinds))
        yield f"clipping_type={algorithm.clipping_type!r} is unknown", f"one of {listed}"


def _ghost_batchnorm(algorithm: Any, facts: RunFacts) -> Iterator[Finding]:
    ghost = algorithm.ghost_batch_size
    sizes = [size for size in (facts.batch_size, facts.last_batch_size) if size is not None]
    if sizes and is_int(ghost) and min(sizes) < ghost:
        yield (
            f"a batch of {min(sizes)} samples is smaller than ghost_batch_size={ghost}",
            f"ghost_batch_size={min(sizes)} or less, larger batches, or drop_last=True",
        )


def _gyro_dropout(algorithm: Any, facts: RunFacts) -> Iterator[Finding]:
    steps, sigma = facts.total_steps, algorithm.sigma
    if steps is not None and steps < sigma:
        yield f"the run has {steps} steps, fewer than sigma={sigma} masks", f"sigma={steps} or less"
    if facts.batch_size is not None and facts.batch_size % algorithm.tau:
        yield (
            f"batches of {facts.batch_size} samples do not divide by tau={algorithm.tau}",
            "a tau that divides the batch size",
        )


def _progressive_resizing(algorithm: Any, _facts: RunFacts) -> Iterator[Finding]:
    if algorithm.delay_fraction + algorithm.finetune_fraction >= 1:
        given = f"{algorithm.delay_fraction} and finetune_fraction={algorithm.finetune_fraction}"
        what = f"delay_fraction={given} leave no time to grow"
        yield what, "two fractions whose sum is below 1"


def _seq_length_warmup(algorithm: Any, facts: RunFacts) -> Iterator[Finding]:
    lengths = (algorithm.max_seq_length - algorithm.min_seq_length) // algorithm.step_size
    steps = facts.total_steps
    if lengths < 1 or (steps is not None and int(steps * algorithm.duration) < lengths):
        of = "the run" if steps is None else f"{steps} steps"
        what = f"{lengths} lengths do not fit into the first {algorithm.duration:.0%} of {of}"
        yield what, "a larger step_size, or a longer run"


_CHECKS: dict[str, Callable[[Any, Any], Iterator[Finding]]] = {
    "GhostBatchNorm": _ghost_batchnorm,
    "GradientClipping": _clipping,
    "GyroDropout": _gyro_dropout,
    "ProgressiveResizing": _progressive_resizing,
    "SeqLengthWarmup": _seq_length_warmup,
}


def _long_half_life(algorithm: Any, name: str, facts: RunFacts) -> Iterator[Problem]:
    """An average that looks back over much of the run contains its beginning."""
    half_life = getattr(algorithm, "half_life", None)
    unit = getattr(getattr(half_life, "unit", None), "value", "")
    length = facts.total_steps if unit == "ba" else None
    if half_life is not None and length is not None and half_life.value > length / 10:
        yield Problem(
            "TW603",
            "warning",
            f"{name}: half_life={half_life.value} steps of a run of {length}",
            "the average would still contain the beginning of the run",
            f"half_life='{max(1, length // 10)}ba' or less",
            (name,),
        )
