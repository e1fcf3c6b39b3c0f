"""What is read for the rows of a shard, in the order in which it is handed on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from echoshift.extract.optical_flow import FlowMethod
from echoshift.pipeline.errors import MediaError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import ClipSpec, FeatureSpec
from echoshift.pipeline.store.interface import Failure


@dataclass(frozen=True, slots=True)
class PictureSource:
    """Where pictures come from: which media, by which decoder, and, for computed flow, how it is made of them."""

    media: Literal["rgb", "flow"]
    decoder: Literal["pyav", "decord"]
    flow: FlowMethod | None = None

    @classmethod
    def of(cls, spec: FeatureSpec) -> PictureSource:
        """Return the source of a picture store."""
        assert spec.frame is not None, "sound has no pictures"
        frame = spec.frame
        method = None if frame.flow == "images" else FlowMethod(frame.flow, frame.short_side, frame.flow_bound)
        return cls(frame.source, spec.decoder, method)


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What a row of some picture stores is made of; comes before its pictures.

    Attributes:
        source, clip: what the stores share; their crops may differ.
        times: seconds that each clip's views cover, float64 [n, 2].
        frames: first and last picture (index in the file), int64 [n, 2].
        pictures: number of each picture of a clip, int64 [n, n_frames]; PictureStretch has the same numbers.
    """

    store_paths: tuple[str, ...]
    row: int
    segment: Segment
    source: PictureSource
    clip: ClipSpec
    times: np.ndarray
    frames: np.ndarray
    pictures: np.ndarray


@dataclass(frozen=True, slots=True)
class PictureStretch:
    """Some of the pictures of a row, uint8 [n, H, W, C], each once, with their numbers, int64 [n], ascending."""

    row: int
    source: PictureSource
    pictures: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True, slots=True)
class SoundSpan:
    """What a row of a sound store covers; comes before its windows. As PictureFacts; frames are samples."""

    store_path: str
    row: int
    times: np.ndarray
    frames: np.ndarray


@dataclass(frozen=True, slots=True)
class SoundWindow:
    """The samples of one entry of a row, float32 [n]."""

    store_path: str
    row: int
    entry: int
    samples: np.ndarray


@dataclass(frozen=True, slots=True)
class SoundEnd:
    """Says, after a row's windows, whether there was any sound, and how loud; without sound no window came before."""

    store_path: str
    row: int
    has_audio: bool
    loudness_dbfs: float


@dataclass(frozen=True, slots=True)
class RowFailure:
    """That a row of some stores gets no features, and why; inputs that came before are void."""

    store_paths: tuple[str, ...]
    row: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class RowEnd:
    """That all inputs of a row, for every store, have been read."""

    row: int


ShardInput = PictureFacts | PictureStretch | SoundSpan | SoundWindow | SoundEnd | RowFailure | RowEnd


def describe_failure(segment: Segment, error: MediaError) -> Failure:
    """Put a media error into the ledger's terms: one line, and whether a retry can help."""
    reason = " ".join(str(error).split())
    return Failure(segment.segment_id, segment.video_id, type(error).__name__, reason, error.retryable)
