"""Profiles a few steps of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile

from torchweld.errors import InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

    from torchweld.interfaces import Border, Progress, Run


class ProfilerWindow:
    """Profiles the steps after ``start`` up to ``stop`` with torch.profiler, on every rank.

    The trace is ``profile-<start>-<stop>-rank<n>.json`` in the run's directory, for
    https://ui.perfetto.dev or ``chrome://tracing``. Outside of the window it costs nothing. Leave
    out the first steps, which allocate and choose kernels.

    Args:
        start: steps before the window, >= 0.
        stop: the last step in it.
        record_shapes: the shapes of every operation's inputs; costs time.
        profile_memory: what is allocated and freed.
        with_stack: lines of Python; costs much time.

    Attributes:
        path: of the trace, None before it is written.
    """

    needs_directory = True

    def __init__(
        self,
        start: int = 10,
        stop: int = 15,
        *,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
    ) -> None:
        if not 0 <= start < stop:
            raise InvalidArgument(
                f"ProfilerWindow({start}, {stop}): give 0 <= start < stop, in optimizer steps"
            )
        self.start, self.stop = start, stop
        self.path: Path | None = None
        self._options: dict[str, Any] = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
        }
        self._profile: Any = None

    def next_due(self, progress: Progress) -> int | None:
        """Where the window begins, then where it ends."""
        if progress.step < self.start:
            return self.start
        return self.stop if progress.step < self.stop else None

    def at(self, border: Border, run: Run) -> None:
        """Begin or end the window."""
        step = border.progress.step
        if "fit_start" in border.kind:
            self.path, self._profile = None, None
        if self._profile is not None and (step >= self.stop or "fit_end" in border.kind):
            self._finish(run)
        elif step == self.start and self._profile is None and "fit_end" not in border.kind:
            cuda = [ProfilerActivity.CUDA] if run.env.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda], **self._options)
            self._profile.start()

    def _finish(self, run: Run) -> None:
        self._profile.stop()
        assert run.directory is not None
        name = f"profile-{self.start}-{self.stop}-rank{run.env.rank}.json"
        self.path = run.directory / name
        self._profile.export_chrome_trace(str(self.path))
        self._profile = None
        run.say(f"profile of steps {self.start + 1} to {self.stop}: {self.path}")
