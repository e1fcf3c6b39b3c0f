"""Lists the encoders by name with their default preprocessing, outputs and builders; needs no torch to be imported.

An encoder of another distribution is found by its entry point in the group `echoshift.encoders`
(docs/adding-an-encoder.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from echoshift.extract.encoders.output_shapes import (
    Shapes,
    plan_audio_outputs,
    plan_bn_inception_outputs,
    plan_i3d_outputs,
    plan_slowfast_outputs,
    plan_slowonly_outputs,
)
from echoshift.extract.recipes import PLANAMENTE2021, ZHANG2022
from echoshift.pipeline.errors import PluginError, SpecError
from echoshift.pipeline.plugins import ENCODER_GROUP, Plugin, list_plugin_names, load_plugin
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec
from echoshift.pipeline.suggestions import suggest

if TYPE_CHECKING:
    from echoshift.extract.encoders.encoder_network import EncoderNetwork


@dataclass(frozen=True, slots=True)
class EncoderEntry:
    """One encoder.

    Attributes:
        name: as written in configs, and the name that weights are made for.
        modality: what it sees.
        revision: raised when its numerics change; part of the fingerprint.
        clip, frame, audio: the default preprocessing, METHODS 2 (Stage-2 test) and 3; exactly one of frame and audio.
            For an audio encoder the clip says what `span="clip"` centres on.
        default_outputs: what is stored when nothing is asked for.
        build: builds the whole network with its classifier and default initialisation.
        output_shapes: gives every output's shape for one clip.
        source: of an encoder from outside, the distribution it came from; set when it is found, not by its author.
    """

    name: str
    modality: Literal["rgb", "flow", "audio"]
    revision: int
    clip: ClipSpec
    frame: FrameSpec | None
    audio: AudioSpec | None
    default_outputs: tuple[str, ...]
    build: Callable[[], EncoderNetwork]
    output_shapes: Callable[[ClipSpec, FrameSpec | AudioSpec], Shapes]
    source: str = ""


# METHODS 2; what mmaction2's networks were trained with.
_IMAGENET_MEAN, _IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# What PyTorchVideo's and PySlowFast's networks were trained with: 0.45 and 0.225 of 0..1.
_PYTORCHVIDEO_MEAN, _PYTORCHVIDEO_STD = (114.75,) * 3, (57.375,) * 3

# 1.07 s five times, for pictures at 60 Hz and for flow at 30 Hz.
_RGB_CLIP = ClipSpec(n_frames=32, stride=2, rate_hz=60, n_clips=5)
_SLOWONLY_CLIP = ClipSpec(n_frames=8, stride=4, rate_hz=30, n_clips=5)
_I3D_FLOW_CLIP = ClipSpec(n_frames=32, stride=1, rate_hz=30, n_clips=5)
_RNA_CLIP = ClipSpec(n_frames=16, stride=2, rate_hz=60, n_clips=5)
_DEMO_CLIP = ClipSpec(n_frames=8, stride=2, rate_hz=15, n_clips=5)


def _rgb(side: int, crop: int, mean: tuple[float, ...], std: tuple[float, ...]) -> FrameSpec:
    return FrameSpec(input="rgb", short_side=side, crop=crop, mean=mean, std=std)


def _flow(crop: int, centre: float) -> FrameSpec:
    return FrameSpec(input="flow", short_side=256, crop=crop, mean=(centre,) * 2, std=(centre,) * 2)


def _build_slowfast(variant: str) -> EncoderNetwork:
    from echoshift.extract.encoders.slowfast import SlowFast
    from echoshift.extract.encoders.slowfast_variants import VARIANTS

    return SlowFast(VARIANTS[variant])


def _build_slowonly() -> EncoderNetwork:
    from echoshift.extract.encoders.slowonly import SlowOnly

    return SlowOnly()


def _build_i3d(n_channels: int) -> EncoderNetwork:
    from echoshift.extract.encoders.inception_i3d import InceptionI3D

    return InceptionI3D(n_channels)


def _build_resnet18_audio() -> EncoderNetwork:
    from echoshift.extract.encoders.audio_resnet import build_resnet18_audio

    return build_resnet18_audio()


def _build_bn_inception_audio() -> EncoderNetwork:
    from echoshift.extract.encoders.bn_inception import BNInception

    return BNInception()


def _build_resnet_demo() -> EncoderNetwork:
    from echoshift.extract.encoders.audio_resnet import build_resnet_demo

    return build_resnet_demo()


def _slowfast(name: str, clip: ClipSpec, frame: FrameSpec) -> EncoderEntry:
    return EncoderEntry(
        name=name,
        modality="rgb",
        revision=2,
        clip=clip,
        frame=frame,
        audio=None,
        default_outputs=("pooled",),
        build=partial(_build_slowfast, name),
        output_shapes=partial(plan_slowfast_outputs, name),
    )


_ENTRIES = (
    _slowfast("slowfast_r50", _RGB_CLIP, _rgb(256, 256, _PYTORCHVIDEO_MEAN, _PYTORCHVIDEO_STD)),
    _slowfast("slowfast_r101", _RGB_CLIP, _rgb(256, 256, _PYTORCHVIDEO_MEAN, _PYTORCHVIDEO_STD)),
    _slowfast("slowfast_r50_mmaction", _RGB_CLIP, _rgb(256, 256, _IMAGENET_MEAN, _IMAGENET_STD)),
    _slowfast("slowfast_r101_mmaction", _RGB_CLIP, _rgb(256, 256, _IMAGENET_MEAN, _IMAGENET_STD)),
    _slowfast("slowfast_demo", _DEMO_CLIP, _rgb(64, 64, _IMAGENET_MEAN, _IMAGENET_STD)),
    EncoderEntry(
        name="slowonly_r50_flow",
        modality="flow",
        revision=2,
        clip=_SLOWONLY_CLIP,
        frame=_flow(crop=256, centre=128.0),
        audio=None,
        default_outputs=("pooled",),
        build=_build_slowonly,
        output_shapes=plan_slowonly_outputs,
    ),
    EncoderEntry(
        name="i3d_rgb",
        modality="rgb",
        revision=2,
        clip=_RGB_CLIP,
        frame=_rgb(256, 224, (127.5,) * 3, (127.5,) * 3),
        audio=None,
        default_outputs=("pooled",),
        build=partial(_build_i3d, 3),
        output_shapes=plan_i3d_outputs,
    ),
    EncoderEntry(
        name="i3d_flow",
        modality="flow",
        revision=2,
        clip=_I3D_FLOW_CLIP,
        frame=_flow(crop=224, centre=127.5),
        audio=None,
        default_outputs=("pooled",),
        build=partial(_build_i3d, 2),
        output_shapes=plan_i3d_outputs,
    ),
    EncoderEntry(
        name="resnet18_audio",
        modality="audio",
        revision=2,
        clip=_RGB_CLIP.model_copy(update={"n_clips": 1}),
        frame=None,
        audio=ZHANG2022,
        default_outputs=("map", "pooled"),
        build=_build_resnet18_audio,
        output_shapes=partial(plan_audio_outputs, 256, 512, 309),
    ),
    EncoderEntry(
        name="bninception_audio",
        modality="audio",
        revision=1,
        clip=_RNA_CLIP,
        frame=None,
        audio=PLANAMENTE2021,
        default_outputs=("pooled",),
        build=_build_bn_inception_audio,
        output_shapes=partial(plan_bn_inception_outputs, 1000),
    ),
    EncoderEntry(
        name="resnet_demo",
        modality="audio",
        revision=2,
        clip=_DEMO_CLIP.model_copy(update={"n_clips": 1}),
        frame=None,
        audio=ZHANG2022.model_copy(update={"duration_s": 2.0}),
        default_outputs=("map", "pooled"),
        build=_build_resnet_demo,
        output_shapes=partial(plan_audio_outputs, 64, 128, 6),
    ),
)

ENCODERS: Mapping[str, EncoderEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def find_encoder(name: str) -> EncoderEntry:
    """Find an encoder by name, echoshift's own or one from outside.

    Raises SpecError with the nearest name, or with all of them; PluginError where the one from outside isn't sound.
    """
    plugin = load_plugin(ENCODER_GROUP, name)
    if plugin is not None:
        return _check_plugin(plugin)
    try:
        return ENCODERS[name]
    except KeyError as error:
        names = (*ENCODERS, *list_plugin_names(ENCODER_GROUP))
        hint = suggest(name, names, listed_by="echoshift list encoders")
        raise SpecError(f"there is no encoder {name!r}; {hint}") from error


def _check_plugin(plugin: Plugin) -> EncoderEntry:
    """Return the entry of an encoder from outside, with its source; raises PluginError naming what is wrong."""
    entry = plugin.found
    if not isinstance(entry, EncoderEntry):
        raise PluginError(
            f"{plugin.source} is a {type(entry).__name__}; an encoder's entry point names an EncoderEntry"
        )
    fault = ""
    if plugin.name in ENCODERS:
        fault = "has the name of one of echoshift's own; take another"
    elif entry.name != plugin.name:
        fault = f"calls itself {entry.name!r}; entry point and EncoderEntry need one name"
    elif (entry.frame is None) == (entry.audio is None) or entry.modality != (
        "audio" if entry.frame is None else entry.frame.input
    ):
        fault = f"needs a `frame` for rgb or flow, or an `audio`, as its modality {entry.modality!r} says"
    else:
        spec = entry.frame or entry.audio
        assert spec is not None, "one of the two is there"
        try:
            shapes = entry.output_shapes(entry.clip, spec)
        except Exception as error:  # a stranger's code may raise anything
            place = f"the encoder {plugin.name!r} of {plugin.source}"
            raise PluginError(f"{place} can't plan its outputs: {type(error).__name__}: {error}") from error
        missing = set(entry.default_outputs) - set(shapes)
        if missing or not entry.default_outputs:
            fault = f"plans no shape for its default outputs {', '.join(sorted(missing)) or '(it has none)'}"
    if fault:
        raise PluginError(f"the encoder {plugin.name!r} of {plugin.source} {fault}")
    return replace(entry, build=partial(_build_plugin, entry, plugin.source), source=plugin.source)


def _build_plugin(entry: EncoderEntry, source: str) -> EncoderNetwork:
    """Build the network of an encoder from outside; raises PluginError where it isn't an EncoderNetwork."""
    from echoshift.extract.encoders.encoder_network import EncoderNetwork

    try:
        network = entry.build()
    except Exception as error:  # a stranger's code may raise anything
        place = f"the encoder {entry.name!r} of {source}"
        raise PluginError(f"{place} can't be built: {type(error).__name__}: {error}") from error
    if not isinstance(network, EncoderNetwork):
        raise PluginError(
            f"the encoder {entry.name!r} of {source} builds a {type(network).__name__}; it must be an EncoderNetwork "
            f"(extract/encoders/encoder_network.py)"
        )
    return network
