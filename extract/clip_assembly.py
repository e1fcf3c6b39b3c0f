"""Puts the clips of rows together on the device, picture by picture, as stretches of pictures come in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from echoshift.extract.crops import Crop, plan_crop
from echoshift.extract.pictures import Placement, place_pictures
from echoshift.extract.shard_inputs import PictureFacts, PictureSource, PictureStretch
from echoshift.pipeline.specs import FeatureSpec, FrameSpec

TakeClip = Callable[[str, int, int, Tensor], None]


@dataclass(slots=True)
class _OpenClip:
    """One entry of a row under way, for all stores that see the same pictures in the same way."""

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
    facts: PictureFacts
    by_frame_spec: dict[FrameSpec, list[_OpenClip]] = field(default_factory=dict)
    crops: dict[tuple[FrameSpec, int, int, int], Crop] = field(default_factory=dict)


class ClipAssembler:
    """The clips that aren't complete yet; each goes to `take(path, row, entry, clip)` when it is.

    A clip is float32 [C, T, crop, crop]. Each picture is sent to the device once, and prepared once for each way in
    which it is cut; a store's entries are numbered (clip * n_views + view) * n_crops + crop.
    """

    def __init__(self, specs: Mapping[str, FeatureSpec], device: torch.device, take: TakeClip) -> None:
        self._specs = specs
        self._device = device
        self._take = take
        self._open: dict[PictureSource, list[_OpenRow]] = {}

    def begin(self, facts: PictureFacts) -> None:
        """Take note of the clips of a row."""
        row = _OpenRow(facts)
        n_views = facts.clip.n_views
        firsts, lasts = facts.pictures.min(axis=1).tolist(), facts.pictures.max(axis=1).tolist()
        for path in facts.store_paths:
            frame = self._specs[path].frame
            assert frame is not None, "pictures go to stores of pictures"
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
                for i, (numbers, first, last) in enumerate(zip(facts.pictures, firsts, lasts, strict=True))
                for number in range(frame.n_crops)
            ]
        self._open.setdefault(facts.source, []).append(row)

    def feed(self, stretch: PictureStretch) -> None:
        """Take pictures of one row, places them, and hand out the clips that become complete."""
        pictures = torch.from_numpy(stretch.pictures)
        if self._device.type == "cuda":
            pictures = pictures.pin_memory().to(self._device, non_blocking=True)
        for row in self._open.get(stretch.source, ()):
            if row.facts.row == stretch.row:
                for frame, clips in row.by_frame_spec.items():
                    self._place(row, frame, clips, pictures, stretch.numbers)

    def end(self, row: int) -> None:
        """Forget what is left of a row: nothing, or what came before it failed."""
        for source, rows in self._open.items():
            self._open[source] = [r for r in rows if r.facts.row != row]

    def _place(
        self, row: _OpenRow, frame: FrameSpec, clips: list[_OpenClip], pictures: Tensor, numbers: np.ndarray
    ) -> None:
        height, width = pictures.shape[1:3]
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
                shape = (len(frame.mean), len(clip.numbers), frame.crop, frame.crop)
                clip.clip = torch.empty(shape, dtype=torch.float32, device=self._device)
            pairs = list(zip(places[positions].tolist(), positions.tolist(), strict=True))
            crop = self._find_crop(row, frame, clip, height, width)
            placements.setdefault(crop, []).append(Placement(clip.clip, pairs))
            clip.n_left -= len(pairs)
        if placements:
            place_pictures(pictures, frame, placements)
        for clip in [clip for clip in clips if clip.n_left == 0]:
            clips.remove(clip)
            assert clip.clip is not None, "a complete clip has pictures"
            for path in clip.store_paths:
                self._take(path, row.facts.row, clip.entry, clip.clip)

    def _find_crop(self, row: _OpenRow, frame: FrameSpec, clip: _OpenClip, height: int, width: int) -> Crop:
        key = (frame, *clip.crop_name)
        if key not in row.crops:
            segment_id = row.facts.segment.segment_id
            row.crops[key] = plan_crop(frame, row.facts.clip, segment_id, *clip.crop_name, height, width)
        return row.crops[key]
