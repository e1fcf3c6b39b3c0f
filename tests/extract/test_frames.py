"""Checks what becomes of frames: resizing, crops, views and presets, against torchvision and hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from echoshift.extract import frames as frames_module
from echoshift.extract.clips import Crop, draw, plan_centre_crop, plan_clips, plan_crop, plan_resized_shape
from echoshift.extract.encoders.registry import list_builtin_encoders
from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.frames import Placement, place_frames, prepare_clips
from echoshift.extract.recipes import PRESETS
from echoshift.extract.torchvision_import import ensure_torchvision
from echoshift.extract.weights.load import resolve_weights
from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.specs import ClipSpec, FeatureSpec, FrameSpec

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


def test_is_close_to_pil():
    from PIL import Image

    height, width = 270, 480
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


@pytest.mark.parametrize("n_bytes", [1, 4 * 3 * 90 * 160 * 4])
@pytest.mark.parametrize(("height", "width"), [(90, 160), (30, 40)])
def test_chunks_change_nothing(monkeypatch, n_bytes, height, width):
    frames = random_frames(3, 5, height, width)
    whole = torch.cat([prepare_clips(clip[None], KINETICS) for clip in frames])
    monkeypatch.setitem(frames_module.N_CHUNK_BYTES, "cpu", n_bytes)
    assert torch.equal(prepare_clips(frames, KINETICS), whole)


def test_flow_has_two_channels():
    spec = FrameSpec(input="flow", short_side=32, crop=28, mean=(128, 128), std=(128, 128))
    frames = random_frames(1, 8, 40, 50, 2)
    clips = prepare_clips(frames, spec)
    assert clips.shape == (1, 2, 8, 28, 28)
    assert clips.abs().max() <= 1
    with pytest.raises(SpecError, match="flow frames have 2 channels, these have 3"):
        prepare_clips(random_frames(1, 8, 40, 50), spec)


def test_wrong_frames_are_refused():
    for shape, dtype, message in (
        ((1, 2, 8, 8, 3), torch.float32, r"must be uint8 \[N, H, W, C\], are torch.float32 \[2, 8, 8, 3\]"),
        ((2, 8, 8, 3), torch.uint8, "must be uint8"),
        ((1, 0, 8, 8, 3), torch.uint8, r"no frame in \[0, 8, 8, 3\]"),
    ):
        with pytest.raises(SpecError, match=message):
            prepare_clips(torch.zeros(shape, dtype=dtype), KINETICS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    frames = random_frames(2, 8, 270, 481)
    torch.testing.assert_close(
        prepare_clips(frames.cuda(), KINETICS).cpu(), prepare_clips(frames, KINETICS), rtol=1e-4, atol=1e-4
    )


CLIPS = ClipSpec(n_frames=4, stride=2, rate_hz=10, sampling="random", n_clips=2, n_views=3, seed=5)
UNSCALED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def frame_spec(**fields: object) -> FrameSpec:
    return FrameSpec.model_validate({"short_side": 64, "crop": 56, **UNSCALED, **fields})


def place(frames: torch.Tensor, spec: FrameSpec, crop: Crop) -> torch.Tensor:
    clip = torch.empty((frames.shape[-1], len(frames), spec.crop, spec.crop))
    place_frames(frames, spec, {crop: [Placement(clip, [(i, i) for i in range(len(frames))])]})
    return clip


def test_draws_are_even_and_named():
    values = np.array([draw(0, f"s{i}", 0, 0, "x") for i in range(4000)])
    assert values.min() >= 0 and values.max() < 1
    assert np.abs(np.histogram(values, 10, (0, 1))[0] - 400).max() < 80
    assert draw(0, "s", 0, 0, "x") == 0.15328587784383152  # the same on every machine
    assert (
        len({draw(0, "s", 0, 0, "x"), draw(1, "s", 0, 0, "x"), draw(0, "s", 1, 0, "x"), draw(0, "s", 0, 1, "x")}) == 4
    )


def test_random_clips_lie_one_in_each_part_anew_in_each_view():
    video = np.arange(400) / 10
    begins = {}
    for i in range(200):
        plan = plan_clips(CLIPS, 0, 20, video, 40, f"s{i}")
        assert plan.n_clips == 6
        begins[i] = np.rint(plan.times_s[:, 0] * 10).astype(int).reshape(2, 3)
    found = np.stack(list(begins.values()))
    part = (200 - 8 + 1) / 2
    assert (found[:, 0] < part).all() and (found[:, 1] >= int(part)).all() and found.max() <= 192
    assert found[:, 0].min() < 5 and found[:, 1].max() > 187
    assert (found[:, :, 0] != found[:, :, 1]).mean() > 0.9
    again = plan_clips(CLIPS, 0, 20, video, 40, "s7")
    np.testing.assert_array_equal(np.rint(again.times_s[:, 0] * 10).astype(int).reshape(2, 3), begins[7])
    short = plan_clips(CLIPS, 0, 0.5, video, 40, "s7")
    assert (short.times_s == [0, 0.5]).all() and short.n_clips == 6


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (64, 64)])
def test_three_crops_are_the_slices_of_the_resized_picture(height, width):
    ensure_torchvision()
    from torchvision.transforms.v2 import functional

    frames = random_frames(1, 2, height, width)[0]
    resized = functional.resize(frames.permute(0, 3, 1, 2).float(), [64], antialias=True)
    long = max(resized.shape[-2:])
    across = (64 - 56) // 2
    for number, start in enumerate((0, (long - 56) // 2, long - 56)):
        top, left = (across, start) if width >= height else (start, across)
        expected = resized[:, :, top : top + 56, left : left + 56].transpose(0, 1)
        crop = plan_crop(frame_spec(crops="three"), CLIPS, "s", 0, 0, number, height, width)
        torch.testing.assert_close(place(frames, frame_spec(crops="three"), crop), expected, rtol=1e-5, atol=1e-4)


def test_random_resized_crops_equal_torchvisions_resized_crop():
    ensure_torchvision()
    from torchvision.transforms.v2 import functional

    spec = frame_spec(crops="random-resized", flip=0.5)
    frames = random_frames(1, 3, 90, 160)[0]
    resized = functional.resize(frames.permute(0, 3, 1, 2).float(), [64], antialias=True)
    areas, aspects, n_mirrored = [], [], 0
    for i in range(300):
        crop = plan_crop(spec, CLIPS, f"s{i}", 0, 0, 0, 90, 160)
        height, width = plan_resized_shape(90, 160, 64)
        assert 0 <= crop.top <= height - crop.height and 0 <= crop.left <= width - crop.width
        areas.append(crop.height * crop.width / height / width)
        aspects.append(crop.width / crop.height)
        n_mirrored += crop.is_mirrored
        if i < 5:
            expected = functional.resized_crop(resized, crop.top, crop.left, crop.height, crop.width, [56, 56])
            expected = (expected.flip(-1) if crop.is_mirrored else expected).transpose(0, 1)
            torch.testing.assert_close(place(frames, spec, crop), expected, rtol=1e-5, atol=1e-3)
    assert min(areas) < 0.15 and max(areas) > 0.7
    assert min(aspects) > 0.7 and max(aspects) < 1.4
    assert 110 < n_mirrored < 190
    jitter = frame_spec(crops="random", short_sides=(64, 80))
    sides = {plan_crop(jitter, CLIPS, f"s{i}", 0, 0, 0, 90, 160).short_side for i in range(300)}
    assert sides == set(range(64, 81))


def test_a_crop_is_drawn_for_a_view_or_for_each_clip():
    for crop_for, n_different in (("view", 1), ("clip", 4)):
        spec = frame_spec(crops="random-resized", crop_for=crop_for)
        assert len({plan_crop(spec, CLIPS, "s", clip, 1, 0, 90, 160) for clip in range(4)}) == n_different
        assert plan_crop(spec, CLIPS, "s", 0, 0, 0, 90, 160) != plan_crop(spec, CLIPS, "s", 0, 1, 0, 90, 160)


def test_mirrored_flow_turns_its_horizontal_sign():
    spec = FrameSpec(
        input="flow", short_side=8, crop=8, mean=(0, 0), std=(1, 1), crops="random", flip=1.0, flow="images"
    )
    frames = random_frames(1, 1, 8, 8, 2)[0]
    clip = place(frames, spec, plan_crop(spec, CLIPS, "s", 0, 0, 0, 8, 8))[:, 0]
    expected = frames[0].permute(2, 0, 1).float().flip(-1)
    assert torch.equal(clip[0], 255 - expected[0]) and torch.equal(clip[1], expected[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"short_sides": (64, 80)}, "goes with crops = 'random'"),
        ({"crops": "random", "short_sides": (40, 80)}, "can't be larger than `short_side`"),
        ({"area": (0.5, 0.1)}, "lower one first"),
        ({"flow": "tvl1"}, "goes with input = 'flow'"),
    ],
)
def test_impossible_crops_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        frame_spec(**fields)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("encoder", list_builtin_encoders())
def test_every_preset_fits_every_encoder(preset, encoder):
    record = resolve_weights("random:0", "slowfast_demo")
    if (preset, encoder) == ("zhang-sound-train", "bninception_audio"):
        with pytest.raises(SpecError, match=r"^bninception_audio: .*those of planamente2021 aren't.*`standardise`$"):
            make_feature_spec(encoder, record, StoreOptions(), preset=preset)
        return
    spec = make_feature_spec(encoder, record, StoreOptions(), preset=preset)
    assert spec.clip.seed == 0 and spec.outputs
    if spec.audio is not None and spec.audio.span == "segment":
        assert spec.clip.n_clips * spec.n_entries_per_clip == (4 if preset == "zhang-sound-train" else 1)


def test_presets_are_the_papers_recipes():
    record = resolve_weights("random:0", "slowfast_demo")

    def make(encoder: str, preset: str) -> FeatureSpec:
        return make_feature_spec(encoder, record, StoreOptions(), preset=preset)

    test = make("slowfast_r101_mmaction", "zhang-encoder-test")
    assert test.clip.n_clips * test.n_entries_per_clip == 15 and test.frame.crop == 256 and test.clip.span == 64
    train = make("slowfast_r101_mmaction", "zhang-stage1-train")
    frame = train.frame
    assert (frame.crop, frame.short_side, frame.area, frame.flip) == (224, 256, (0.08, 1.0), 0.5)
    flow = make("slowonly_r50_flow", "zhang-stage2-train")
    assert (flow.clip.n_frames, flow.clip.stride, flow.clip.rate_hz, flow.clip.n_clips) == (8, 4, 30, 5)
    charades = make("slowfast_r50", "charades-test")
    assert charades.clip.span / charades.clip.rate_hz == pytest.approx(21.33, abs=0.01)
    assert charades.clip.n_clips == 10 and charades.frame.crop == 256
    rna = make("resnet18_audio", "rna-test")
    assert (rna.audio.rate_hz, rna.audio.span, rna.clip.n_clips) == (24000, "clip", 5)
    assert {o.name: o.shape for o in rna.outputs}["map"] == (256, 16, 16)
    with pytest.raises(SpecError, match="did you mean 'charades-test'"):
        make("slowfast_r50", "charades-tset")
