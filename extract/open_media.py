"""Keeps the media that one thread reads open from row to row, and notices when a file is replaced meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from echoshift.extract.identity_check import MediaWatch
from echoshift.extract.media import MediaLocation, Modality, locate_media, open_frames
from echoshift.extract.readers.protocol import FrameReader
from echoshift.extract.readers.pyav_audio import PyAvAudioReader
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec


class OpenMedia:
    """Opens media below one root for one thread; the last used reader of each kind stays open."""

    def __init__(self, root: Path, layout: MediaLayout) -> None:
        self._root, self._layout = root, layout
        self._readers: dict[tuple[Modality, str], tuple[MediaLocation, FrameReader]] = {}
        self._sound: tuple[MediaLocation, PyAvAudioReader] | None = None
        self._watch = MediaWatch(root, layout)

    def locate(self, segment: Segment, modality: Modality) -> MediaLocation:
        """Find a segment's media; raises MediaNotFoundError or MediaError."""
        return locate_media(self._root, self._layout, segment, modality)

    def open_pictures(self, segment: Segment, modality: Modality, decoder: Literal["pyav", "decord"]) -> FrameReader:
        """Open a segment's pictures, or return the reader that is open on them already."""
        location = self.locate(segment, modality)
        key = (modality, decoder)
        if key in self._readers:
            if self._readers[key][0] == location:
                return self._readers[key][1]
            self._readers.pop(key)[1].close()
        reader = open_frames(location, decoder)
        self._readers[key] = (location, reader)
        return reader

    def open_sound(self, location: MediaLocation) -> PyAvAudioReader | None:
        """Open sound, or return the reader that is open on it already; None where `location` is none."""
        if location.kind == "none":
            return None
        if self._sound is not None:
            if self._sound[0] == location:
                return self._sound[1]
            self._sound[1].close()
            self._sound = None
        self._sound = (location, PyAvAudioReader(location.path))
        return self._sound[1]

    def check_unchanged(self, segment: Segment, spec: FeatureSpec, digest: np.ndarray) -> None:
        """Check, after a row was read, that its media are those its digest, uint8 [16], was computed from.

        Raises MediaChangedError if a file was replaced since the run looked at it.
        """
        self._watch.check_identity(segment, spec, digest)

    def __enter__(self) -> OpenMedia:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, reader in self._readers.values():
            reader.close()
        if self._sound is not None:
            self._sound[1].close()
