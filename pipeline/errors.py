"""Errors that echoshift raises, and the words that suggest what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EchoshiftError(Exception):
    """The root of every error that echoshift raises on purpose; the CLI prints it as one line, exit code 2."""


class CardError(EchoshiftError):
    """A dataset card is missing, malformed or contradicts itself."""


class ManifestError(EchoshiftError):
    """A manifest or an annotation file is malformed; the message names file and line."""


class UnsafePickleError(ManifestError):
    """A pickle asks for a constructor that is not on the list of those it needs."""


class SpecError(EchoshiftError):
    """A feature specification is impossible or contradicts the encoder."""


class MediaError(EchoshiftError):
    """A video or its audio can't give what was asked; `retryable` says whether trying again can help."""

    retryable = False


class MediaNotFoundError(MediaError):
    """No file, folder or tar under the media root matches the video."""

    retryable = True


class DecodeError(MediaError):
    """The decoder refuses the file, or it holds fewer frames or samples than it declares."""


class MediaChangedError(MediaError):
    """A file is no longer the one that the run found when it began."""

    retryable = True


class MediaTimeoutError(MediaError):
    """Reading a segment takes longer than it may."""

    retryable = True


class MediaMemoryError(MediaError):
    """A segment needs more memory than the machine has."""

    retryable = True


class SegmentOutsideVideoError(MediaError):
    """A segment begins after its video has ended, or reaches further beyond the end than is tolerated."""


class PluginError(EchoshiftError):
    """An encoder or a method of another distribution can't be loaded, or isn't what it must be."""


class WeightsError(EchoshiftError):
    """Weights are missing, have another checksum, or don't match the network key by key."""


class StoreError(EchoshiftError):
    """A feature store can't be opened, was written by another format, or fails verification."""


class StoreBusyError(StoreError):
    """Another run holds the store; the message says which."""


class StoreReadOnlyError(StoreError):
    """The place of a store can be read but not written; reading goes on, a run with work to do can't."""


class StoreFullError(StoreError):
    """The disk under a store is full, or would be; what is committed stays, and the same command goes on from there."""


class ClusterError(EchoshiftError):
    """Workers can't be started or reached, don't see the same files or versions, or the scheduler is gone."""


class RunError(EchoshiftError):
    """A training run can't begin or go on: data, configuration or what an earlier run left don't fit."""


N_NEAREST = 3
N_LISTED = 24
_CUTOFF = 0.6
_BAND = 0.1  # how much less alike than the nearest another name may be, and still be offered
_N_CONTAINED = 3  # characters, from which on a name within another counts as near


def find_nearest(name: str, known: Iterable[str], n: int = N_NEAREST) -> list[str]:
    """Find up to n of the known names that a mistyped one may have meant, the most alike first; [] where none may.

    Letters' case doesn't count. Where no name is alike (ratio of difflib's SequenceMatcher of 0.6 or more), those count
    that begin with the mistyped one, or with which it begins.
    """
    by_lower: dict[str, str] = {}
    for one in known:
        by_lower.setdefault(one.lower(), one)
    wanted = name.lower()
    close = difflib.get_close_matches(wanted, by_lower, n=n, cutoff=_CUTOFF)
    if not close:
        longer = [one for one in by_lower if min(len(one), len(wanted)) >= _N_CONTAINED]
        return [by_lower[one] for one in longer if one.startswith(wanted) or wanted.startswith(one)][:n]
    ratios = {one: difflib.SequenceMatcher(None, one, wanted).ratio() for one in by_lower if one in close}
    near = sorted(ratios, key=lambda one: -ratios[one])  # of the equally alike, the first known comes first
    return [by_lower[one] for one in near if ratios[one] >= ratios[near[0]] - _BAND]


def suggest(name: str, known: Iterable[str], *, listed_by: str = "", there: str = "there are") -> str:
    """Write the end of an error about an unknown name: `did you mean 'a' or 'b'?`, or what there is.

    `listed_by` is the command that lists them all; without it a list of more than 24 names is cut short. `there` are
    the words before a list, such as `it has`.
    """
    names = list(dict.fromkeys(known))
    see = f"`{listed_by}` lists all" if listed_by else ""
    near = find_nearest(name, names)
    if near:
        return f"did you mean {_join(near)}?" + (f" {see}" if see else "")
    if len(names) <= N_LISTED:
        return f"{there} {', '.join(names) or 'none'}"
    shown = f"{there} {', '.join(names[:N_LISTED])}, … {len(names)} in all"
    return f"{shown}; {see}" if see else shown


def _join(names: list[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
