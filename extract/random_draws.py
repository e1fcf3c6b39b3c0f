"""Draws the random numbers of augmented views, each from its name alone: none depends on what ran before."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def draw(seed: int, segment_id: str, view: int, clip: int, what: str) -> float:
    """Draw a number from [0, 1), evenly: the first 53 bits of a blake2b of all that names it.

    The same on every machine, in every worker and batch, and under every version of NumPy.
    """
    name = _name(seed, segment_id, view, clip, what)
    return (int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 11) / 2**53


def draw_integer(low: int, high: int, seed: int, segment_id: str, view: int, clip: int, what: str) -> int:
    """Draw a whole number from low..high, both included."""
    return low + int(draw(seed, segment_id, view, clip, what) * (high - low + 1))


def draw_array(
    shape: tuple[int, ...], seed: int, segment_id: str, view: int, clip: int, what: str
) -> npt.NDArray[np.float32]:
    """Draw an array of numbers from [0, 1), evenly, float32: 24 bits each, the upper ones of 4 bytes, low byte first.

    The bytes are a SHAKE-128 of all that names the array, as long as it is: 5 ms for the 258,028 numbers of a
    spectrogram, where a hash for each of them would take a second.
    """
    n_bytes = 4 * int(np.prod(shape))
    stream = hashlib.shake_128(_name(seed, segment_id, view, clip, what)).digest(n_bytes)
    drawn = (np.frombuffer(stream, dtype="<u4") >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
    return drawn.reshape(shape)


def _name(seed: int, segment_id: str, view: int, clip: int, what: str) -> bytes:
    return f"{seed}\n{segment_id}\n{view}\n{clip}\n{what}".encode()
