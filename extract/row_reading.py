"""Reads what the networks need of one row: pictures in stretches, each decoded once for all stores, and sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from echoshift.extract.clips import plan_clips
from echoshift.extract.extraction_plan import StoreTarget
from echoshift.extract.flow_making import FlowMaker, pair_pictures
from echoshift.extract.open_media import OpenMedia
from echoshift.extract.readers.protocol import FrameReader, find_shown_frames
from echoshift.extract.shard_inputs import PictureFacts, PictureSource, PictureStretch, RowEnd, RowFailure, ShardInput
from echoshift.extract.shard_inputs import describe_failure as describe
from echoshift.extract.sound_reading import read_sound
from echoshift.pipeline.errors import MediaError, MediaMemoryError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import ClipSpec

MAX_STRETCH_BYTES = 64 * 2**20
# Clips that a stretch touches exist at the same time: small pictures must not make it long.
MAX_STRETCH_PICTURES = 64

ReadInputs = Callable[[OpenMedia, int, Segment, Sequence[StoreTarget]], Iterator[ShardInput]]


def read_row(
    media: OpenMedia, row: int, segment: Segment, targets: Sequence[StoreTarget], digests: Mapping[str, np.ndarray]
) -> Iterator[ShardInput]:
    """Read the inputs of one row for some stores; whatever fails yields a RowFailure for the stores it concerns.

    `digests` are by store path what the row is to be made from, uint8 [16]; media that are other ones by the time they
    were read fail the row. Whatever the length of video and segment, at most MAX_STRETCH_BYTES of pictures (or one
    picture) and MAX_STRETCH_PICTURES are read at a time.
    """
    pictured = sorted((t for t in targets if t.spec.frame is not None), key=_media_key)
    for _, group in groupby(pictured, key=_media_key):
        yield from _guard(media, row, segment, list(group), digests, read_pictures)
    for target in targets:
        if target.spec.audio is not None:
            yield from _guard(media, row, segment, [target], digests, _read_sound)
    yield RowEnd(row)


def _media_key(target: StoreTarget) -> tuple[str, str]:
    source = PictureSource.of(target.spec)
    return source.media, source.decoder


def _guard(
    media: OpenMedia,
    row: int,
    segment: Segment,
    targets: Sequence[StoreTarget],
    digests: Mapping[str, np.ndarray],
    read: ReadInputs,
) -> Iterator[ShardInput]:
    """Read for stores that share their media, and turn an error into their failure."""
    try:
        yield from read(media, row, segment, targets)
    except MediaError as error:
        yield RowFailure(tuple(t.path for t in targets), row, describe(segment, error))
        return
    except MemoryError as error:
        failure = MediaMemoryError(f"video {segment.video_id}: reading it needs more memory than there is: {error}")
        yield RowFailure(tuple(t.path for t in targets), row, describe(segment, failure))
        return
    for target in targets:
        try:
            media.check_unchanged(segment, target.spec, digests[target.path])
        except MediaError as error:
            yield RowFailure((target.path,), row, describe(segment, error))


def _read_sound(media: OpenMedia, row: int, segment: Segment, targets: Sequence[StoreTarget]) -> Iterator[ShardInput]:
    return read_sound(media, row, segment, targets[0].path, targets[0].spec)


def read_pictures(
    media: OpenMedia, row: int, segment: Segment, targets: Sequence[StoreTarget]
) -> Iterator[PictureFacts | PictureStretch]:
    """Read the pictures of one row for stores that share media and decoder; raises MediaError for what fails."""
    source = PictureSource.of(targets[0].spec)
    reader = media.open_pictures(segment, source.media, source.decoder)
    wanted: set[int] = set()
    makers: list[FlowMaker] = []
    groups: dict[tuple[PictureSource, ClipSpec], tuple[str, ...]] = {}
    for target in targets:
        key = (PictureSource.of(target.spec), target.spec.clip)
        groups[key] = (*groups.get(key, ()), target.path)
    for (source, clip), paths in groups.items():
        plan = plan_clips(
            clip, segment.start_s, segment.stop_s, reader.frame_times_s, reader.info.duration_s, segment.segment_id
        )
        shown = find_shown_frames(reader.frame_times_s, plan.frame_times_s)
        spans = np.stack([shown.min(axis=1), shown.max(axis=1)], axis=1)
        numbers = shown
        if source.flow is None:
            wanted.update(np.unique(shown).tolist())
        else:
            before, after = pair_pictures(reader, plan.frame_times_s, shown, clip.rate_hz)
            maker = next((m for m in makers if m.source == source), None)
            if maker is None:
                maker = FlowMaker(source)
                makers.append(maker)
            numbers = maker.add(before, after)
            spans = np.stack([before.min(axis=1), after.max(axis=1)], axis=1)
        yield PictureFacts(paths, row, segment, source, clip, plan.times_s, spans, numbers)
    plain = next((source for source, _ in groups if source.flow is None), None)
    yield from _read_stretches(reader, row, plain, np.array(sorted(wanted), dtype=np.int64), makers)


def _read_stretches(
    reader: FrameReader, row: int, plain: PictureSource | None, wanted: np.ndarray, makers: Sequence[FlowMaker]
) -> Iterator[PictureStretch]:
    """Decode each picture once, in order of time, and hand on the plain ones and the flow that becomes complete."""
    needed = np.unique(np.concatenate([wanted, *(maker.needed for maker in makers)]))
    n_picture_bytes = reader.info.height * reader.info.width * 3
    n_at_most = max(1, min(MAX_STRETCH_PICTURES, MAX_STRETCH_BYTES // n_picture_bytes))
    for start in range(0, len(needed), n_at_most):
        numbers = needed[start : start + n_at_most]
        pictures = reader.read_frames(reader.frame_times_s[numbers])
        if plain is not None:
            chosen = np.isin(numbers, wanted, assume_unique=True)
            if chosen.all():
                yield PictureStretch(row, plain, pictures, numbers)
            elif chosen.any():
                yield PictureStretch(row, plain, pictures[chosen], numbers[chosen])
        for maker in makers:
            stretch = maker.feed(row, pictures, numbers)
            if stretch is not None:
                yield stretch
