"""Computes the shapes of the encoders' outputs from their specifications alone; needs no torch."""

from __future__ import annotations

from echoshift.extract.encoders.slowfast_variants import VARIANTS, plan_slowfast_shapes
from echoshift.extract.recipes import plan_spectrogram_shape
from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec

Shapes = dict[str, tuple[int, ...]]


def plan_slowfast_outputs(variant: str, clip: ClipSpec, frame: FrameSpec | AudioSpec) -> Shapes:
    """Return the shapes of SlowFast's outputs for one clip."""
    return plan_slowfast_shapes(VARIANTS[variant], clip.n_frames, _side(frame))


def plan_slowonly_outputs(clip: ClipSpec, frame: FrameSpec | AudioSpec) -> Shapes:
    """Return the shapes of SlowOnly's outputs for one clip."""
    side = -(-_side(frame) // 16)
    return {"trunk": (1024, clip.n_frames, side, side), "pooled": (2048,), "pooled_avg": (2048,), "logits": (400,)}


def plan_i3d_outputs(clip: ClipSpec, frame: FrameSpec | AudioSpec) -> Shapes:
    """Return the shapes of I3D's outputs for one clip."""
    side = -(-_side(frame) // 16)
    trunk = (832, -(-clip.n_frames // 4), side, side)
    return {"trunk": trunk, "pooled": (1024,), "pooled_max": (1024,), "logits": (400,)}


def plan_audio_outputs(
    n_map: int, n_pooled: int, n_classes: int, clip: ClipSpec, audio: FrameSpec | AudioSpec
) -> Shapes:
    """Return the shapes of an audio ResNet's outputs for one window of sound; the clip has no say in them."""
    if not isinstance(audio, AudioSpec):
        raise SpecError("an audio encoder needs an AudioSpec, not a FrameSpec")
    n_bands, n_windows = plan_spectrogram_shape(audio)
    return {"map": (n_map, -(-n_bands // 16), -(-n_windows // 16)), "pooled": (n_pooled,), "logits": (n_classes,)}


def plan_bn_inception_outputs(n_classes: int, clip: ClipSpec, audio: FrameSpec | AudioSpec) -> Shapes:
    """Return the shapes of BN-Inception's outputs for one window of sound; the clip has no say in them."""
    if not isinstance(audio, AudioSpec):
        raise SpecError("an audio encoder needs an AudioSpec, not a FrameSpec")
    # Two poolings leave half a position out, the convolutions of stride 2 don't.
    n_bands, n_windows = (-(-(-(-n // 2) // 2 // 2) // 2) for n in plan_spectrogram_shape(audio))
    return {"map": (608, n_bands, n_windows), "pooled": (1024,), "logits": (n_classes,)}


def _side(frame: FrameSpec | AudioSpec) -> int:
    if not isinstance(frame, FrameSpec):
        raise SpecError("a picture encoder needs a FrameSpec, not an AudioSpec")
    return frame.crop
