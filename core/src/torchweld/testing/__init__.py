"""For authors of plugins: conformance suites to subclass, ranks to run them on.

Core never imports this package; it needs pytest.
"""

from __future__ import annotations

from torchweld.testing.processes import run_ranks

__all__ = ["run_ranks"]
