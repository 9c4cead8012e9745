"""The tables of ``benchmarks.together``, and how far the gains of its parts multiply."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

BESIDE = "beside"
Times = Mapping[str, float]
"""Seconds an image of one process, by stage."""


class Clock(Protocol):
    """What is read of a training; see ``benchmarks.together.Clock``."""

    wall: dict[str, float]
    cpu: dict[str, float]
    beside: float
    images: int
    images_beside: int
    losses: list[float]
    first: float
    held: int
    peak: int


def print_report(
    clocks: Mapping[str, Sequence[Clock]], parts: Mapping[str, Sequence[str]], batch: int
) -> None:
    """Print everything as Markdown; of several rounds the median.

    Args:
        clocks: the rounds of each training.
        parts: names of what stands alone in each combination.
        batch: images a process and step.
    """
    wall = {name: _median([_wall(c) for c in each]) for name, each in clocks.items()}
    cpu = {name: _median([_cpu(c) for c in each]) for name, each in clocks.items()}
    _print_whole(clocks, wall, cpu)
    _print_stages("ms a step on the clock", wall, batch)
    _print_stages("CPU-ms a step", cpu, batch)
    print()
    for name, alone in parts.items():
        print(compounding(name, alone, wall, "second"))
        print(compounding(name, alone, cpu, "CPU-second"))
    print(_same_losses(clocks, [("deepspeed", "plain"), ("fsdp", "plain"), tuple(parts)[:2]]))


def _wall(clock: Clock) -> Times:
    return {stage: seconds / clock.images for stage, seconds in clock.wall.items()}


def _cpu(clock: Clock) -> Times:
    """Of the thread that trains, and of all that works beside it."""
    found = {stage: seconds / clock.images for stage, seconds in clock.cpu.items()}
    return {**found, BESIDE: clock.beside / clock.images_beside}


def _median(rounds: Sequence[Times]) -> Times:
    """The round whose sum is the median, so that its stages belong together."""
    return sorted(rounds, key=_total)[(len(rounds) - 1) // 2]


def _total(times: Times) -> float:
    return sum(times.values())


def _print_whole(
    clocks: Mapping[str, Sequence[Clock]], wall: Mapping[str, Times], cpu: Mapping[str, Times]
) -> None:
    print("\n| | img/s | ratio | CPU-ms an image | ratio | first s | peak MB | held MB | loss |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, each in clocks.items():
        last, half = each[-1], len(each[-1].losses) // 2
        loss = sum(last.losses[half:]) / len(last.losses[half:])
        took, used = _total(wall[name]), _total(cpu[name])
        print(
            f"| {name} | {2 / took:,.0f} | {_total(wall['plain']) / took:.2f} "
            f"| {1000 * used:.2f} | {_total(cpu['plain']) / used:.2f} "
            f"| {min(c.first for c in each):.2f} | {max(last.peak, 0) / 1e6:.0f} "
            f"| {last.held / 1e6:.1f} | {loss:.3f} |"
        )


def _print_stages(title: str, times: Mapping[str, Times], batch: int) -> None:
    stages = list(times["plain"])
    print(f"\n| {title} | {' | '.join(stages)} | all |")
    print("|---" * (len(stages) + 2) + "|")
    for name, of_stage in times.items():
        cells = [f"{1000 * batch * of_stage[stage]:.1f}" for stage in stages]
        print(f"| {name} | {' | '.join(cells)} | {1000 * batch * _total(of_stage):.1f} |")


def compounding(name: str, alone: Sequence[str], times: Mapping[str, Times], unit: str) -> str:
    """Compare all together with each alone, and name the stage that is the limit.

    If every part changed all of a step by its factor, the factors would multiply. What a part adds
    in a stage of its own is the same whatever else is on, and weighs more in a shorter step: that
    is why the sum of the differences is given, too. A sum that is met shows that no part costs
    another anything.
    """
    plain, together = _total(times["plain"]), _total(times[name])
    ratio, faster = _ratio(name, alone, times), plain / together
    added = plain + sum(_total(times[each]) - plain for each in alone)
    summed = plain / added if added > 0 else math.inf
    without = {stage: _ratio(name, alone, times, without=stage) for stage in times[name]}
    limit = max(without, key=lambda stage: without[stage])
    return (
        f"- {name}, images a {unit}: {faster:.2f} times plain, product of each alone "
        f"{faster / ratio:.2f}, ratio {ratio:.2f}; by the sum of what each saves and costs alone "
        f"it would be {summed:.2f} times. The limit is {limit}, "
        f"{times[name][limit] / together:.0%} of its step: of all other stages the ratio is "
        f"{without[limit]:.2f}."
    )


def _ratio(
    name: str, alone: Sequence[str], times: Mapping[str, Times], *, without: str = ""
) -> float:
    """Combined speed-up through the product of the single ones; of all stages, or all but one."""

    def total(of: str) -> float:
        return sum(seconds for stage, seconds in times[of].items() if stage != without)

    product = math.prod(total("plain") / total(each) for each in alone)
    return total("plain") / total(name) / product


def _same_losses(clocks: Mapping[str, Sequence[Clock]], pairs: Sequence[tuple[str, ...]]) -> str:
    found = []
    for one, other in pairs:
        losses = zip(clocks[one][-1].losses, clocks[other][-1].losses, strict=True)
        found.append(f"{one} to {other} {max(abs(a - b) for a, b in losses):.1g}")
    return f"- Largest difference between the losses of a step: {'; '.join(found)}."
