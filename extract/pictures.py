"""Turns decoded pictures into a network's input, on the device that holds them: resize, crop, mirror, normalise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from echoshift.extract.crops import Crop, plan_centre_crop, plan_resized_shape
from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.specs import FrameSpec

N_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""How many bytes of float pictures at full size exist at a time: on a CPU what stays near its cache is 2-5 x faster."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where pictures go: picture number `source` of a stretch to position `position` of a clip, for each pair.

    `clip` is float32 [C, T, crop, crop] on the pictures' device, and is written to.
    """

    clip: Tensor
    pairs: Sequence[tuple[int, int]]


def place_pictures(frames: Tensor, spec: FrameSpec, placements: Mapping[Crop, Sequence[Placement]]) -> None:
    """Prepare uint8 pictures [N, H, W, C] once for each crop, and write them where they belong.

    In this order: the short side is resized (torch bilinear with antialiasing, half-pixel centres, in float, never
    rounded back to 0..255), the crop is cut out and, if it hasn't the network's size, resized likewise, mirrored, and
    (x - mean) / std taken a channel. A picture whose short side fits already is not resampled. Pictures are independent
    of each other, so the result doesn't depend on how they come. At most N_CHUNK_BYTES of full-size float pictures
    exist at a time.
    """
    _check_frames(frames, spec)
    height, width = frames.shape[1:3]
    mean = torch.tensor(spec.mean, dtype=torch.float32, device=frames.device)[:, None, None]
    std = torch.tensor(spec.std, dtype=torch.float32, device=frames.device)[:, None, None]
    pictures = frames.permute(0, 3, 1, 2)
    for short_side in dict.fromkeys(crop.short_side for crop in placements):
        crops = {crop: found for crop, found in placements.items() if crop.short_side == short_side}
        shape = plan_resized_shape(height, width, short_side)
        is_resized = (height, width) != shape
        n_chunk = _plan_chunk(pictures, shape[0] * shape[1])
        wanted = sorted({source for found in crops.values() for p in found for source, _ in p.pairs})
        for start in range(0, len(wanted), n_chunk):
            numbers = wanted[start : start + n_chunk]
            chunk = pictures[_as_index(numbers)]
            resized = _resize(chunk, shape) if is_resized else chunk
            for crop, found in crops.items():
                _place_crop(resized, numbers, crop, found, spec, mean, std)


def _as_index(numbers: list[int]) -> slice | list[int]:
    """Return a slice, which copies nothing, where numbers follow each other."""
    first, last = numbers[0], numbers[-1]
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers


def _resize(pictures: Tensor, shape: tuple[int, int]) -> Tensor:
    plain = pictures.to(torch.float32, memory_format=torch.contiguous_format)
    return interpolate(plain, shape, mode="bilinear", align_corners=False, antialias=True)


def _place_crop(
    resized: Tensor,
    numbers: list[int],
    crop: Crop,
    placements: Sequence[Placement],
    spec: FrameSpec,
    mean: Tensor,
    std: Tensor,
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
    normalised = (cut - mean) / std
    index_of = {place: i for i, place in enumerate(needed)}
    for placement in placements:
        for source, position in placement.pairs:
            if source in place_of:
                placement.clip[:, position].copy_(normalised[index_of[place_of[source]]])


def prepare_clips(frames: Tensor, spec: FrameSpec) -> Tensor:
    """Turn uint8 [B, T, H, W, C] into centre crops, float32 [B, C, T, crop, crop], see `place_pictures`."""
    if frames.ndim != 5:
        raise SpecError(f"clips must be uint8 [B, T, H, W, C], are {frames.dtype} {list(frames.shape)}")
    n_clips, n_frames, height, width, n_channels = frames.shape
    flat = frames.reshape(n_clips * n_frames, height, width, n_channels)
    _check_frames(flat, spec)
    top, left = plan_centre_crop(*plan_resized_shape(height, width, spec.short_side), spec.crop)
    crop = Crop(spec.short_side, top, left, spec.crop, spec.crop)
    result = torch.empty((n_clips, n_channels, n_frames, spec.crop, spec.crop), device=frames.device)
    placements = [Placement(result[b], [(b * n_frames + t, t) for t in range(n_frames)]) for b in range(n_clips)]
    place_pictures(flat, spec, {crop: placements})
    return result


def _plan_chunk(pictures: Tensor, n_resized_pixels: int) -> int:
    """Compute how many pictures [N, C, H, W] go through float at a time."""
    n_channels, height, width = pictures.shape[1:]
    n_bytes = 4 * n_channels * max(height * width, n_resized_pixels)
    return max(1, N_CHUNK_BYTES.get(pictures.device.type, N_CHUNK_BYTES["cpu"]) // n_bytes)


def _check_frames(frames: Tensor, spec: FrameSpec) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4:
        raise SpecError(f"pictures must be uint8 [N, H, W, C], are {frames.dtype} {list(frames.shape)}")
    if frames.shape[-1] != len(spec.mean):
        raise SpecError(f"{spec.input} pictures have {len(spec.mean)} channels, these have {frames.shape[-1]}")
    if 0 in frames.shape:
        raise SpecError(f"there is no picture in {list(frames.shape)}")
