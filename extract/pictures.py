"""Turns decoded pictures into a network's input, on the device that holds them: resize, centre crop, normalise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.errors import SpecError
from pipeline.specs import FrameSpec

N_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""How many bytes of float pictures at full size exist at a time: on a CPU what stays near its cache is 2-5 x faster."""


def plan_resized_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Computes the (height, width) of a picture whose short side is resized to `short_side`.

    The long side is floor(long * short_side / short), in integers (torchvision's rule, and pytorchvideo's up to the
    rounding of its floats).
    """
    if height <= width:
        return short_side, short_side * width // height
    return short_side * height // width, short_side


def plan_centre_crop(height: int, width: int, crop: int) -> tuple[int, int]:
    """Computes the (top, left) of the centre crop: half of what is left over, rounded down."""
    return (height - crop) // 2, (width - crop) // 2


def prepare_clips(frames: Tensor, spec: FrameSpec) -> Tensor:
    """Turns uint8 [B, T, H, W, C] into the input of a video network, float32 [B, C, T, crop, crop] (METHODS section 2).

    In this order: the short side is resized to `spec.short_side` (torch bilinear with antialiasing, half-pixel centres,
    in float, never rounded back to 0..255), the centre is cut out, (x - mean) / std is taken a channel. A picture whose
    short side fits already is not resampled. Pictures are independent of each other, so the result doesn't depend on
    how clips are batched. At most N_CHUNK_BYTES of full-size float pictures exist at a time, beside the result.
    """
    _check_frames(frames, spec)
    n_clips, n_frames, height, width, n_channels = frames.shape
    resized_height, resized_width = plan_resized_shape(height, width, spec.short_side)
    top, left = plan_centre_crop(resized_height, resized_width, spec.crop)
    mean = torch.tensor(spec.mean, dtype=torch.float32, device=frames.device)[:, None, None]
    std = torch.tensor(spec.std, dtype=torch.float32, device=frames.device)[:, None, None]

    pictures = frames.reshape(n_clips * n_frames, height, width, n_channels).permute(0, 3, 1, 2)
    is_resized = (height, width) != (resized_height, resized_width)
    if not is_resized:
        pictures = pictures[:, :, top : top + spec.crop, left : left + spec.crop]
    n_chunk = _plan_chunk(pictures, resized_height * resized_width)
    n_pictures = pictures.shape[0]
    result = torch.empty((n_clips, n_channels, n_frames, spec.crop, spec.crop), device=frames.device)
    by_picture = result.transpose(1, 2)  # [B, T, C, crop, crop], a view into the result
    buffer = torch.empty((min(n_chunk, n_pictures), *pictures.shape[1:]), device=frames.device)
    for start in range(0, n_pictures, n_chunk):
        chunk = pictures[start : start + n_chunk]
        resized = buffer[: chunk.shape[0]].copy_(chunk)
        if is_resized:
            resized = interpolate(
                resized, (resized_height, resized_width), mode="bilinear", align_corners=False, antialias=True
            )[:, :, top : top + spec.crop, left : left + spec.crop]
        normalised = (resized - mean) / std
        for i, picture in enumerate(normalised, start):
            by_picture[i // n_frames, i % n_frames] = picture
    return result


def _plan_chunk(pictures: Tensor, n_resized_pixels: int) -> int:
    """Computes how many pictures [N, C, H, W] go through float at a time."""
    n_channels, height, width = pictures.shape[1:]
    n_bytes = 4 * n_channels * max(height * width, n_resized_pixels)
    return max(1, N_CHUNK_BYTES.get(pictures.device.type, N_CHUNK_BYTES["cpu"]) // n_bytes)


def _check_frames(frames: Tensor, spec: FrameSpec) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 5:
        raise SpecError(f"pictures must be uint8 [B, T, H, W, C], are {frames.dtype} {list(frames.shape)}")
    if frames.shape[-1] != len(spec.mean):
        raise SpecError(f"{spec.input} pictures have {len(spec.mean)} channels, these have {frames.shape[-1]}")
    if 0 in frames.shape:
        raise SpecError(f"there is no picture in {list(frames.shape)}")
