from __future__ import annotations

import numpy as np
import pytest
import torch

from echoshift.extract import frames as frames_module
from echoshift.extract.clips import plan_centre_crop, plan_resized_shape
from echoshift.extract.frames import prepare_clips
from echoshift.extract.torchvision_import import ensure_torchvision
from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.specs import FrameSpec

KINETICS = FrameSpec(short_side=64, crop=56, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
PLAIN = FrameSpec(short_side=64, crop=64, mean=(0, 0, 0), std=(1, 1, 1))
SIZES = [(48, 64), (90, 160), (161, 91), (64, 64), (64, 113), (270, 481)]


def random_frames(n_clips: int, n_frames: int, height: int, width: int, n_channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    shape = (n_clips, n_frames, height, width, n_channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_equals_torchvision(height, width):
    ensure_torchvision()
    from torchvision.transforms.v2 import functional

    frames = random_frames(2, 3, height, width)
    ours = prepare_clips(frames, KINETICS)
    assert ours.shape == (2, 3, 3, 56, 56) and ours.dtype == torch.float32 and ours.is_contiguous()
    theirs = functional.resize(frames.permute(0, 1, 4, 2, 3).float(), [64], antialias=True)
    assert tuple(theirs.shape[-2:]) == plan_resized_shape(height, width, 64)
    top, left = plan_centre_crop(*theirs.shape[-2:], 56)
    theirs = theirs[..., top : top + 56, left : left + 56]
    theirs = functional.normalize(theirs, list(KINETICS.mean), list(KINETICS.std)).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(90, 160), (270, 480)])
def test_is_close_to_pil(height, width):
    from PIL import Image

    # A natural picture is smooth: noise would overstate how the filters' rounding differs.
    rows, columns = np.mgrid[:height, :width]
    waves = 127 + 60 * np.sin(rows / 9) + 60 * np.cos(columns / 7)
    frame = np.stack([waves, waves[::-1], waves[:, ::-1]], axis=-1).round().clip(0, 255).astype(np.uint8)
    new_height, new_width = plan_resized_shape(height, width, 64)
    theirs = np.asarray(Image.fromarray(frame).resize((new_width, new_height), Image.Resampling.BILINEAR), np.float32)
    top, left = plan_centre_crop(new_height, new_width, 64)
    ours = prepare_clips(torch.from_numpy(frame)[None, None], PLAIN)[0, :, 0].permute(1, 2, 0).numpy()
    difference = np.abs(ours - theirs[top : top + 64, left : left + 64])
    assert difference.max() < 1.5 and difference.mean() < 0.5


def test_a_picture_of_the_right_size_is_only_cut_and_normalised():
    frames = random_frames(1, 2, 64, 100)
    left = (100 - 64) // 2
    expected = frames[:, :, :, left : left + 64].permute(0, 4, 1, 2, 3).float()
    assert torch.equal(prepare_clips(frames, PLAIN), expected)


@pytest.mark.parametrize("n_bytes", [1, 4 * 3 * 90 * 160 * 4, 1 << 30])
@pytest.mark.parametrize(("height", "width"), [(90, 160), (64, 70), (30, 40)])
def test_chunks_change_nothing(monkeypatch, n_bytes, height, width):
    frames = random_frames(3, 5, height, width)
    whole = torch.cat([prepare_clips(clip[None], KINETICS) for clip in frames])
    monkeypatch.setitem(frames_module.N_CHUNK_BYTES, "cpu", n_bytes)
    assert torch.equal(prepare_clips(frames, KINETICS), whole)


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    sizes = []

    def watched(picture, *args, **kwargs):
        sizes.append(picture.numel() * picture.element_size())
        return torch.nn.functional.interpolate(picture, *args, **kwargs)

    monkeypatch.setattr(frames_module, "interpolate", watched)
    prepare_clips(random_frames(2, 16, 540, 960), KINETICS)
    assert len(sizes) > 8 and max(sizes) <= frames_module.N_CHUNK_BYTES["cpu"]


def test_flow_has_two_channels():
    spec = FrameSpec(input="flow", short_side=32, crop=28, mean=(128, 128), std=(128, 128))
    frames = random_frames(1, 8, 40, 50, 2)
    clips = prepare_clips(frames, spec)
    assert clips.shape == (1, 2, 8, 28, 28)
    assert clips.abs().max() <= 1
    with pytest.raises(SpecError, match="flow frames have 2 channels, these have 3"):
        prepare_clips(random_frames(1, 8, 40, 50), spec)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((720, 1280), (256, 455)), ((1280, 720), (455, 256)), ((1080, 1920), (256, 455)), ((72, 96), (256, 341))],
)
def test_resized_shapes(size, expected):
    assert plan_resized_shape(*size, 256) == expected


def test_wrong_frames_are_refused():
    with pytest.raises(SpecError, match=r"must be uint8 \[N, H, W, C\], are torch.float32 \[2, 8, 8, 3\]"):
        prepare_clips(torch.zeros(1, 2, 8, 8, 3), KINETICS)
    with pytest.raises(SpecError, match="must be uint8"):
        prepare_clips(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), KINETICS)
    with pytest.raises(SpecError, match=r"no frame in \[0, 8, 8, 3\]"):
        prepare_clips(torch.zeros(1, 0, 8, 8, 3, dtype=torch.uint8), KINETICS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    frames = random_frames(2, 8, 270, 481)
    torch.testing.assert_close(
        prepare_clips(frames.cuda(), KINETICS).cpu(), prepare_clips(frames, KINETICS), rtol=1e-4, atol=1e-4
    )
