"""Turns decoded frames into clips, a network's input, on the device: resize, crop, mirror, normalise, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from echoshift.extract.clips import Crop, plan_centre_crop, plan_crop, plan_resized_shape
from echoshift.extract.rows import FrameClips, FrameStretch
from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.specs import FeatureSpec, FrameSpec

N_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""How many bytes of float frames at full size exist at a time: on a CPU what stays near its cache is 2-5 x faster."""

TakeClip = Callable[[str, int, Tensor], None]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where frames go: frame number `source` of a stretch to position `position` of a clip, for each pair.

    `clip` is float32 [C, T, crop, crop] on the frames' device, and is written to.
    """

    clip: Tensor
    pairs: Sequence[tuple[int, int]]


def place_frames(frames: Tensor, spec: FrameSpec, placements: Mapping[Crop, Sequence[Placement]]) -> None:
    """Prepare uint8 frames [N, H, W, C] once for each crop, and write them where they belong.

    In this order: the short side is resized (torch bilinear with antialiasing, half-pixel centres, in float, never
    rounded back to 0..255), the crop is cut out and, if it hasn't the network's size, resized likewise, mirrored, and
    (x - mean) / std taken a channel. A frame whose short side fits already is not resampled. Frames are independent of
    each other, so the result doesn't depend on how they come. At most N_CHUNK_BYTES of full-size float frames exist at
    a time.
    """
    _check_frames(frames, spec)
    height, width = frames.shape[1:3]
    channels_first = frames.permute(0, 3, 1, 2)
    for short_side in dict.fromkeys(crop.short_side for crop in placements):
        crops = {crop: found for crop, found in placements.items() if crop.short_side == short_side}
        shape = plan_resized_shape(height, width, short_side)
        n_frame_bytes = 4 * frames.shape[-1] * max(height * width, shape[0] * shape[1])
        n_chunk = max(1, N_CHUNK_BYTES.get(frames.device.type, N_CHUNK_BYTES["cpu"]) // n_frame_bytes)
        wanted = sorted({source for found in crops.values() for p in found for source, _ in p.pairs})
        for start in range(0, len(wanted), n_chunk):
            numbers = wanted[start : start + n_chunk]
            chunk = channels_first[_as_index(numbers)]
            resized = _resize(chunk, shape) if (height, width) != shape else chunk
            for crop, found in crops.items():
                _place_crop(resized, numbers, crop, found, spec)


def _as_index(numbers: list[int]) -> slice | list[int]:
    """Return a slice, which copies nothing, where numbers follow each other."""
    first, last = numbers[0], numbers[-1]
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers


def _resize(frames: Tensor, shape: tuple[int, int]) -> Tensor:
    plain = frames.to(torch.float32, memory_format=torch.contiguous_format)
    return interpolate(plain, shape, mode="bilinear", align_corners=False, antialias=True)


def _place_crop(
    resized: Tensor, numbers: list[int], crop: Crop, placements: Sequence[Placement], spec: FrameSpec
) -> None:
    place_of = {number: i for i, number in enumerate(numbers)}
    needed = sorted({place_of[s] for p in placements for s, _ in p.pairs if s in place_of})
    if not needed:
        return
    rows, columns = slice(crop.top, crop.top + crop.height), slice(crop.left, crop.left + crop.width)
    cut = resized[_as_index(needed)][:, :, rows, columns]
    if (crop.height, crop.width) != (spec.crop, spec.crop):
        cut = _resize(cut, (spec.crop, spec.crop))
    cut = cut.float()
    if crop.is_mirrored:
        cut = cut.flip(-1)
        if spec.input == "flow":
            cut = torch.cat([255 - cut[:, :1], cut[:, 1:]], dim=1)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=cut.device)[:, None, None] for v in (spec.mean, spec.std))
    normalised = (cut - mean) / std
    index_of = {place: i for i, place in enumerate(needed)}
    for placement in placements:
        for source, position in placement.pairs:
            if source in place_of:
                placement.clip[:, position].copy_(normalised[index_of[place_of[source]]])


def prepare_clips(frames: Tensor, spec: FrameSpec) -> Tensor:
    """Turn uint8 [B, T, H, W, C] into centre crops, float32 [B, C, T, crop, crop], see `place_frames`."""
    if frames.ndim != 5:
        raise SpecError(f"clips must be uint8 [B, T, H, W, C], are {frames.dtype} {list(frames.shape)}")
    n_clips, n_frames, height, width, n_channels = frames.shape
    flat = frames.reshape(n_clips * n_frames, height, width, n_channels)
    _check_frames(flat, spec)
    top, left = plan_centre_crop(*plan_resized_shape(height, width, spec.short_side), spec.crop)
    crop = Crop(spec.short_side, top, left, spec.crop, spec.crop)
    result = torch.empty((n_clips, n_channels, n_frames, spec.crop, spec.crop), device=frames.device)
    placements = [Placement(result[b], [(b * n_frames + t, t) for t in range(n_frames)]) for b in range(n_clips)]
    place_frames(flat, spec, {crop: placements})
    return result


def _check_frames(frames: Tensor, spec: FrameSpec) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4:
        raise SpecError(f"frames must be uint8 [N, H, W, C], are {frames.dtype} {list(frames.shape)}")
    if frames.shape[-1] != len(spec.mean):
        raise SpecError(f"{spec.input} frames have {len(spec.mean)} channels, these have {frames.shape[-1]}")
    if 0 in frames.shape:
        raise SpecError(f"there is no frame in {list(frames.shape)}")


@dataclass(slots=True)
class _OpenClip:
    """One entry of a row under way, for all stores that see the same frames in the same way."""

    store_paths: list[str]
    entry: int
    crop_name: tuple[int, int, int]
    numbers: np.ndarray
    first: int
    last: int
    n_left: int
    clip: Tensor | None = None


@dataclass(slots=True)
class _OpenRow:
    clips: FrameClips
    by_frame_spec: dict[FrameSpec, list[_OpenClip]] = field(default_factory=dict)
    crops: dict[tuple[FrameSpec, int, int, int], Crop] = field(default_factory=dict)


class ClipAssembler:
    """The clips of one row that aren't complete yet; each goes to `take(path, entry, clip)` when it is.

    A clip is float32 [C, T, crop, crop]. Each frame is sent to the device once, and prepared once for each way in which
    it is cut; a store's entries are numbered (clip * n_views + view) * n_crops + crop.
    """

    def __init__(self, specs: Mapping[str, FeatureSpec], device: torch.device, take: TakeClip) -> None:
        self._specs = specs
        self._device = device
        self._take = take
        self._open: list[_OpenRow] = []

    def begin(self, clips: FrameClips) -> None:
        """Take note of clips of the row."""
        row = _OpenRow(clips)
        n_views = clips.clip.n_views
        firsts, lasts = clips.numbers.min(axis=1).tolist(), clips.numbers.max(axis=1).tolist()
        for path in clips.store_paths:
            frame = self._specs[path].frame
            assert frame is not None, "frames go to stores of frames"
            if frame in row.by_frame_spec:
                for clip in row.by_frame_spec[frame]:
                    clip.store_paths.append(path)
                continue
            row.by_frame_spec[frame] = [
                _OpenClip(
                    store_paths=[path],
                    entry=i * frame.n_crops + number,
                    crop_name=(i // n_views, i % n_views, number),
                    numbers=numbers,
                    first=first,
                    last=last,
                    n_left=len(numbers),
                )
                for i, (numbers, first, last) in enumerate(zip(clips.numbers, firsts, lasts, strict=True))
                for number in range(frame.n_crops)
            ]
        self._open.append(row)

    def feed(self, stretch: FrameStretch) -> None:
        """Take frames of the row, place them, and hand out the clips that become complete."""
        frames = torch.from_numpy(stretch.frames)
        if self._device.type == "cuda":
            frames = frames.pin_memory().to(self._device, non_blocking=True)
        for row in self._open:
            if row.clips.source == stretch.source:
                for spec, clips in row.by_frame_spec.items():
                    self._place(row, spec, clips, frames, stretch.numbers)

    def end(self) -> None:
        """Forget what is left of the row: nothing, or what came before it failed."""
        self._open.clear()

    def _place(
        self, row: _OpenRow, spec: FrameSpec, clips: list[_OpenClip], frames: Tensor, numbers: np.ndarray
    ) -> None:
        placements: dict[Crop, list[Placement]] = {}
        first, last = int(numbers[0]), int(numbers[-1])
        for clip in clips:
            if clip.last < first or clip.first > last:  # most windows of a long video, at each of its stretches
                continue
            places = np.minimum(np.searchsorted(numbers, clip.numbers), len(numbers) - 1)
            positions = np.flatnonzero(numbers[places] == clip.numbers)
            if not len(positions):
                continue
            if clip.clip is None:
                shape = (len(spec.mean), len(clip.numbers), spec.crop, spec.crop)
                clip.clip = torch.empty(shape, dtype=torch.float32, device=self._device)
            pairs = list(zip(places[positions].tolist(), positions.tolist(), strict=True))
            key = (spec, *clip.crop_name)
            if key not in row.crops:
                segment_id = row.clips.segment.segment_id
                row.crops[key] = plan_crop(spec, row.clips.clip, segment_id, *clip.crop_name, *frames.shape[1:3])
            placements.setdefault(row.crops[key], []).append(Placement(clip.clip, pairs))
            clip.n_left -= len(pairs)
        if placements:
            place_frames(frames, spec, placements)
        for clip in [clip for clip in clips if clip.n_left == 0]:
            clips.remove(clip)
            assert clip.clip is not None, "a complete clip has frames"
            for path in clip.store_paths:
                self._take(path, clip.entry, clip.clip)
