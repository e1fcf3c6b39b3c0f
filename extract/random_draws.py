"""Draws the random numbers of augmented views, each from its name alone: none depends on what ran before."""

from __future__ import annotations

import hashlib


def draw(seed: int, segment_id: str, view: int, clip: int, what: str) -> float:
    """Draws a number from [0, 1), evenly: the first 53 bits of a blake2b of all that names it.

    The same on every machine, in every worker and batch, and under every version of NumPy.
    """
    text = f"{seed}\n{segment_id}\n{view}\n{clip}\n{what}"
    return (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 11) / 2**53


def draw_integer(low: int, high: int, seed: int, segment_id: str, view: int, clip: int, what: str) -> int:
    """Draws a whole number from low..high, both included."""
    return low + int(draw(seed, segment_id, view, clip, what) * (high - low + 1))
