"""Keeps the media that one thread reads open from row to row, and notices when a file is replaced meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from extract.media import MediaLocation, Modality, identify_media, locate_media, open_frames
from extract.media_survey import identify_sources
from extract.readers.protocol import FrameReader
from pipeline.cards import MediaLayout
from pipeline.errors import MediaChangedError, MediaNotFoundError
from pipeline.rows import NO_MEDIA, compute_digest
from pipeline.segments import Segment
from pipeline.specs import FeatureSpec

Signature = tuple[tuple[int, int, int], ...]


class OpenMedia:
    """Opens media below one root for one thread; the last used reader of each kind stays open."""

    def __init__(self, root: Path, layout: MediaLayout) -> None:
        self._root, self._layout = root, layout
        self._readers: dict[tuple[Modality, str], tuple[MediaLocation, FrameReader]] = {}
        self._identities: dict[MediaLocation, tuple[Signature, str]] = {}

    def locate(self, segment: Segment, modality: Modality) -> MediaLocation:
        """Finds a segment's media; raises MediaNotFoundError or MediaError."""
        return locate_media(self._root, self._layout, segment, modality)

    def open_pictures(self, segment: Segment, modality: Modality, decoder: Literal["pyav", "decord"]) -> FrameReader:
        """Opens a segment's pictures, or gives the reader that is open on them already."""
        location = self.locate(segment, modality)
        key = (modality, decoder)
        if key in self._readers:
            if self._readers[key][0] == location:
                return self._readers[key][1]
            self._readers.pop(key)[1].close()
        reader = open_frames(location, decoder)
        self._readers[key] = (location, reader)
        return reader

    def check_unchanged(self, segment: Segment, spec: FeatureSpec, digest: np.ndarray) -> None:
        """Checks, after a row was read, that its media are those that its digest (uint8 [16]) was computed from.

        Raises MediaChangedError if a file was replaced since the run looked at it.
        """
        identity = identify_sources(self._identify, segment, spec)
        if compute_digest(identity, segment.start_s, segment.stop_s) != digest.tobytes():
            raise MediaChangedError(
                f"the media of video {segment.video_id} changed while the run was under way; run it again"
            )

    def _identify(self, segment: Segment, modality: Modality) -> str:
        try:
            location = self.locate(segment, modality)
        except MediaNotFoundError:
            return NO_MEDIA
        if location.kind == "none":
            return NO_MEDIA
        signature = _sign(location.path)
        known = self._identities.get(location)
        if known is None or known[0] != signature:
            known = (signature, identify_media(location))
            self._identities[location] = known
        return known[1]

    def __enter__(self) -> OpenMedia:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, reader in self._readers.values():
            reader.close()


def _sign(path: Path) -> Signature:
    """Gives what the file system says of a file, or of a folder and the folders in it; cheap, and enough to look again.

    No time stamp is compared with a clock: any difference only makes the content be looked at once more.
    """
    places = [path, *sorted(p for p in path.iterdir() if p.is_dir())] if path.is_dir() else [path]
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in (place.stat() for place in places))
