"""Checks, after a row's media were read, that they are still those its digest was computed from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from echoshift.extract.media import MediaLocation, Modality, identify_media, locate_media
from echoshift.extract.media_survey import UNREADABLE, identify_sources
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.errors import MediaChangedError, MediaError, MediaNotFoundError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec
from echoshift.pipeline.store.layout import NO_MEDIA, compute_digest

Signature = tuple[int, int, int, int]


@dataclass(slots=True)
class MediaWatch:
    """Knows the identity of each file by what the system says of it (device, inode, size, time of change).

    The content is hashed once a file, and again only where the system's answer has changed: a touched file passes, a
    replaced one doesn't. Of a folder of frames the folder alone is asked: files added, removed or renamed are noticed,
    one that is overwritten in place is not. Not for threads: each reader of rows has its own.
    """

    root: Path
    layout: MediaLayout
    _known: dict[MediaLocation, tuple[Signature, str]] = field(default_factory=dict)

    def check_identity(self, segment: Segment, spec: FeatureSpec, digest: np.ndarray) -> None:
        """Raise MediaChangedError unless `digest`, uint8 [16], is that of the media as they are now.

        To be called after the last of a row's inputs has been read, and before the row counts.
        """
        identity = identify_sources(self._identify, segment, spec)
        if compute_digest(identity, segment.start_s, segment.stop_s) != digest.tobytes():
            raise MediaChangedError(
                f"the video {segment.video_id} changed while it was read; run the same command again"
            )

    def _identify(self, segment: Segment, modality: Modality) -> str:
        try:
            location = locate_media(self.root, self.layout, segment, modality)
            if location.kind == "none":
                return NO_MEDIA
            signature = _read_signature(location.path)
            known = self._known.get(location)
            if known is None or known[0] != signature:
                known = (signature, identify_media(location))
                self._known[location] = known
            return known[1]
        except (MediaNotFoundError, FileNotFoundError):
            return NO_MEDIA
        except (MediaError, OSError):
            return UNREADABLE


def _read_signature(path: Path) -> Signature:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
