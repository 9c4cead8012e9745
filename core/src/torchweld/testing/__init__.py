"""For authors of plugins: conformance suites to subclass, ranks to run them on.

Core never imports this package; it needs pytest.
"""

from __future__ import annotations

from torchweld.testing.data import DataSourceConformance
from torchweld.testing.processes import RanksFailed, run_ranks, spawn_ranks
from torchweld.testing.registry import empty_registry
from torchweld.testing.strategy import StrategyConformance
from torchweld.testing.surgery import SurgeryConformance

__all__ = [
    "DataSourceConformance",
    "RanksFailed",
    "StrategyConformance",
    "SurgeryConformance",
    "empty_registry",
    "run_ranks",
    "spawn_ranks",
]
