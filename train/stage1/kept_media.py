"""Keeps decoded pictures of short segments from epoch to epoch, so that a small data set is decoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from echoshift.extract.media import Modality, OpenMedia
from echoshift.extract.readers.interface import FrameReader, VideoInfo, find_shown_frames
from echoshift.pipeline.cards import MediaLayout
from echoshift.pipeline.segments import Segment

_LARGEST_PART = 8  # a segment may take an eighth of what is kept, or it is read each time
_Decoder = Literal["pyav", "decord"]
_VideoKey = tuple[str, str, str, Modality, _Decoder]
_SegmentKey = tuple[str, Modality, _Decoder]


@dataclass(frozen=True, slots=True)
class _VideoFacts:
    info: VideoInfo
    frame_times_s: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Stretch:
    """All pictures of a segment, uint8 [n, H, W, C], from number `first` on."""

    first: int
    pictures: npt.NDArray[np.uint8]


class KeptMedia(OpenMedia):
    """Opens media as OpenMedia does, and keeps at most `n_kept_bytes` of pictures, those used last.

    A segment's pictures are all decoded when the first of them is asked for, unless they are more than an eighth of
    what may be kept. Files must not be replaced meanwhile: that isn't noticed.
    """

    def __init__(self, root: Path, layout: MediaLayout, n_kept_bytes: int) -> None:
        super().__init__(root, layout)
        self._n_kept_bytes = n_kept_bytes
        self._n_bytes = 0
        self._stretches: OrderedDict[_SegmentKey, _Stretch] = OrderedDict()
        self._videos: dict[_VideoKey, _VideoFacts] = {}

    def open_frames(self, segment: Segment, modality: Modality, decoder: _Decoder) -> FrameReader:
        """Return a reader of a segment's pictures, which opens the media only for what isn't kept."""

        def open_media() -> FrameReader:
            return super(KeptMedia, self).open_frames(segment, modality, decoder)

        video = (segment.video_id, segment.domain, segment.split, modality, decoder)
        if video not in self._videos:
            reader = open_media()
            self._videos[video] = _VideoFacts(reader.info, reader.frame_times_s)
        facts, key = self._videos[video], (segment.segment_id, modality, decoder)
        if key in self._stretches:
            self._stretches.move_to_end(key)
        else:
            self._keep(key, segment, facts, 2 if modality == "flow" else 3, open_media)
        return _KeptReader(facts, self._stretches.get(key), open_media)

    def _keep(
        self,
        key: _SegmentKey,
        segment: Segment,
        facts: _VideoFacts,
        n_channels: int,
        open_media: Callable[[], FrameReader],
    ) -> None:
        """Decode a segment's pictures, and one more for flow, and make room for them."""
        n_frames = len(facts.frame_times_s)
        first, last = find_shown_frames(facts.frame_times_s, [segment.start_s, segment.stop_s]).tolist()
        n_bytes = (min(last + 2, n_frames) - first) * facts.info.height * facts.info.width * n_channels
        if n_bytes > self._n_kept_bytes // _LARGEST_PART:
            return
        pictures = open_media().read_frames(facts.frame_times_s[first : last + 2])
        self._stretches[key] = _Stretch(first, pictures)
        self._n_bytes += pictures.nbytes
        while self._n_bytes > self._n_kept_bytes:
            _, dropped = self._stretches.popitem(last=False)
            self._n_bytes -= dropped.pictures.nbytes


class _KeptReader:
    """A FrameReader that takes what is kept, and opens the media for the rest."""

    def __init__(self, facts: _VideoFacts, kept: _Stretch | None, open_media: Callable[[], FrameReader]) -> None:
        self._facts, self._kept, self._open_media = facts, kept, open_media

    @property
    def info(self) -> VideoInfo:
        """The video's facts."""
        return self._facts.info

    @property
    def frame_times_s(self) -> npt.NDArray[np.float64]:
        """When each frame is first shown."""
        return self._facts.frame_times_s

    def read_frames(self, times_s: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Read the frames shown at the given times."""
        if self._kept is not None:
            places = find_shown_frames(self.frame_times_s, times_s).reshape(-1) - self._kept.first
            if len(places) and places.min() >= 0 and places.max() < len(self._kept.pictures):
                return self._kept.pictures[places]
        return self._open_media().read_frames(times_s)

    def close(self) -> None:
        """Close nothing: the media are KeptMedia's."""

    def __enter__(self) -> _KeptReader:
        return self

    def __exit__(self, *exc: object) -> None:
        return None
