"""Random numbers that depend on what they are for, and on nothing that happened before.

A number is a hash of (seed, epoch, number of the sample, which draw), so pixels are the same for
any number of threads and processes, and the middle of an epoch is as near as its beginning.

Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators" (SplitMix64).
"""

from __future__ import annotations

import numpy as np

from torchweld_ffcv.compiled import compiled

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_UNIT = 2.0**-53


@compiled
def scrambled(value: np.uint64) -> np.uint64:
    """Hash 64 bits; every bit of the result depends on every bit of ``value``."""
    value = (value ^ (value >> _S30)) * _FIRST
    value = (value ^ (value >> _S27)) * _SECOND
    hashed: np.uint64 = value ^ (value >> _S31)
    return hashed


@compiled
def sample_key(seed: int, epoch: int, number: int) -> np.uint64:
    """The key of one sample in one epoch: what its random numbers are drawn from."""
    key = scrambled(np.uint64(seed) + _GOLDEN)
    key = scrambled(key ^ (np.uint64(epoch) * _GOLDEN + _FIRST))
    return scrambled(key ^ (np.uint64(number) * _GOLDEN + _SECOND))


@compiled
def uniform(key: np.uint64, draw: int) -> float:
    """Number ``draw`` of a sample, in [0, 1)."""
    return float(scrambled(key + np.uint64(draw + 1) * _GOLDEN) >> _S11) * _UNIT
