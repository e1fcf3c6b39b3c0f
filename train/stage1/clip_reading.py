"""Reads all clips of one segment by the way that extraction reads them: same planning, same pictures, same crops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from echoshift.extract.frames import ClipAssembler
from echoshift.extract.media import OpenMedia
from echoshift.extract.rows import FrameClips, read_frames
from echoshift.extract.weights.load import WeightsRecord
from echoshift.extract.work import StoreTarget
from echoshift.pipeline.errors import MediaError, MediaMemoryError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec

_PATH = "clips"
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class SegmentClips:
    """The network's inputs of one segment, entry by entry (entry number: FeatureSpec.n_entries_per_clip).

    Attributes:
        clips: normalised, float32 [n_entries, C, T, H, W].
        times_s: seconds that each covers, float64 [n_entries, 2].
        frames: first and last picture, index in the file, int64 [n_entries, 2].
    """

    clips: Tensor
    times_s: np.ndarray
    frames: np.ndarray


def read_clips(media: OpenMedia, segment: Segment, spec: FeatureSpec) -> SegmentClips:
    """Read the clips of a segment as `spec` says, bit for bit what extraction feeds the network; flow may be computed.

    Of `spec` the outputs, dtype, precision and weights mean nothing. Raises MediaError naming the segment.
    """
    target = StoreTarget(_PATH, spec, WeightsRecord("", spec.weights, "", None))  # reading asks for the spec alone
    taken: dict[int, Tensor] = {}
    assembler = ClipAssembler({_PATH: spec}, _CPU, lambda _path, entry, clip: taken.__setitem__(entry, clip))
    facts: FrameClips | None = None
    try:
        for item in read_frames(media, segment, [target]):
            if isinstance(item, FrameClips):
                facts = item
                assembler.begin(item)
            else:
                assembler.feed(item)
    except MediaError as error:
        raise type(error)(_explain(segment, str(error))) from error
    except MemoryError as error:
        raise MediaMemoryError(_explain(segment, f"reading it needs more memory than there is: {error}")) from error
    assert facts is not None and spec.frame is not None, "a row's facts come before its pictures"
    clips = [taken[entry] for entry in range(len(taken))]
    n_crops = spec.frame.n_crops
    assert len(clips) == len(facts.times) * n_crops, "every clip is complete once all pictures are read"
    return SegmentClips(
        clips[0][None] if len(clips) == 1 else torch.stack(clips),
        facts.times.repeat(n_crops, axis=0),
        facts.spans.repeat(n_crops, axis=0),
    )


def _explain(segment: Segment, reason: str) -> str:
    return (
        f"segment {segment.segment_id}: {' '.join(reason.split())}; mend its video {segment.video_id} and run the same "
        "command again, or take the segment out of the manifest"
    )
