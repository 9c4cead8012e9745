"""A package, because FairScale installs one of this name, which would win over a mere folder."""

from __future__ import annotations
