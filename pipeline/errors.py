"""The errors that a user can meet; each message names the thing, the place and the remedy."""

from __future__ import annotations


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
    """A video or its sound can't give what was asked; `retryable` says whether trying again can help."""

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
    """A segment needs more memory than there is."""

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


class LeaseLostError(StoreError):
    """Another process has taken over a store while this one was out of reach; this one must not write any more."""


class ClusterError(EchoshiftError):
    """Workers can't be started or reached, don't see the same files or versions, or the scheduler is gone."""


class RunError(EchoshiftError):
    """A training run can't begin or go on: data, configuration or what an earlier run left don't fit."""
