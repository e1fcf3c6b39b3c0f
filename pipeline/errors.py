"""Defines the errors that a user can meet; each message names the thing, the place and the remedy."""

from __future__ import annotations


class EchoshiftError(Exception):
    """Is the root of every error that echoshift raises on purpose; the CLI prints it as one line, exit code 2."""


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


class SegmentOutsideVideoError(MediaError):
    """A segment begins after its video has ended, or reaches further beyond the end than is tolerated."""


class WeightsError(EchoshiftError):
    """Weights are missing, have another checksum, or don't match the network key by key."""


class StoreError(EchoshiftError):
    """A feature store can't be opened, was written by another format, or fails verification."""


class StoreBusyError(StoreError):
    """Another run holds the store; the message says which."""


class ClusterError(EchoshiftError):
    """Workers can't be started or reached, don't see the same files or versions, or the scheduler is gone."""
