"""Class activation maps of a checkpoint of Stage 1 over a clip, by captum's Grad-CAM on the last block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.extract.media import OpenMedia
from echoshift.extract.rows import plan_clips_of
from echoshift.extract.weights.load import load_encoder
from echoshift.pipeline.errors import ManifestError, MediaNotFoundError, RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec, FrameSpec, fingerprint
from echoshift.train.alignment.two_streams import TwoStreams
from echoshift.train.features import FeatureBatch
from echoshift.train.look.features import open_stores
from echoshift.train.look.figures import QUIET_COLOUR, Plot, make_figure, plot_style
from echoshift.train.look.run_choice import SOURCE_ONLY, RunChoice, choose_stage1_run, describe_run, find_checkpoint
from echoshift.train.look.segment import find_segment, read_checkpoint_facts
from echoshift.train.look.segment_media import SegmentAudio, read_segment_audio
from echoshift.train.look.show import draw_waveform
from echoshift.train.loop import Dropouts
from echoshift.train.runs import RunRecord
from echoshift.train.splits import TRAIN, DataPlaces, find_shift
from echoshift.train.stage1.audio import AudioFeatures
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage1.encoder import CLIP, build_encoder, read_checkpoint
from echoshift.train.stage1.frames import read_clips
from echoshift.train.stage1.inputs import choose_audio, choose_visual

N_SHOWN = 6
_OPACITY = 0.65
_RATE_HZ = 16000
Classify = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ActivationMap:
    """Where in a clip a network sees a class (Selvaraju et al., ICCV 2017).

    Attributes:
        run: names the run.
        segment: whose middle clip it is.
        values: float32 [T, H, W], 0 where nothing speaks for the class; not scaled.
        frames: what the network saw, uint8 [T, H, W, 3].
        times_s: of each frame, in seconds of the video, float64 [T].
        class_name, probability: the class that is asked for, and how probable the clip makes it.
        layer: the module whose activations are weighed.
    """

    run: str
    segment: Segment
    values: np.ndarray
    frames: np.ndarray
    times_s: np.ndarray
    class_name: str
    probability: float
    layer: str


class ActivationMapper:
    """Makes activation maps with one checkpoint; for one thread.

    Where the encoder was trained by a method of alignment, the logits are the method's. Raises RunError where the store
    of audio that the gates, or the method, are made for isn't in the cache.
    """

    def __init__(self, places: DataPlaces, runs_dir: Path, record: RunRecord) -> None:
        path = find_checkpoint(runs_dir, record)
        facts = read_checkpoint_facts(path)
        config = Stage1Config.model_validate_json(facts.config)
        self._places, self._run = places, describe_run(record)
        hears = config.attention.enabled or config.objective.enabled
        self._audio = None
        if hears:
            stores = {fingerprint(store.spec): store for store in open_stores(places)}
            if facts.sound not in stores:
                raise RunError(f"the store of audio {facts.sound}, of which {path} makes gates, isn't in the cache")
            self._audio = AudioFeatures(stores[facts.sound])
        choice = choose_visual(config.visual, places, config.visual.test_preset)
        self._spec: FeatureSpec = choice.spec
        audio_network = None
        if config.objective.enabled:
            audio_network = load_encoder(config.sound.encoder, choose_audio(config.sound).weights)
        source = find_shift(places.card, record.shift).source
        there = {segment.domain for segment in places.manifest if segment.split == TRAIN}
        self._model = build_encoder(
            load_encoder(config.visual.encoder, choice.weights),
            self._audio.map_shape[0] if self._audio is not None else 0,
            len(facts.classes),
            config,
            seed=0,
            audio_network=audio_network,
            source_domains=sorted(there & set(source)),
            multi_label=places.card.task == "multi-label",
        )
        read_checkpoint(path, self._model)
        self._model.eval()

    def map(self, media: OpenMedia, segment: Segment, class_name: str = "") -> ActivationMap:
        """Map a class over the middle clip of a segment; "" is the class that the clip makes most probable.

        Raises MediaError naming what can't be read, RunError for an unknown class.
        """
        classes, spec = self._places.card.classes, self._spec
        assert spec.frame is not None, "the visual encoder sees"
        if class_name and class_name not in classes:
            raise RunError(f"{self._places.card.name} has no class {class_name!r}; it has {', '.join(classes)}")
        read = read_clips(media, segment, spec)
        entry = len(read.clips) // 2
        clip = read.clips[entry : entry + 1]
        classify = self._make_classifier(segment)
        with torch.no_grad():
            logits = classify(clip)[0]
        probabilities = logits.sigmoid() if self._places.card.task == "multi-label" else logits.softmax(dim=0)
        target = classes.index(class_name) if class_name else int(logits.argmax())
        values, layer = compute_activation_map(self._model.gated.network, classify, clip, target)
        reader = media.open_frames(segment, spec.frame.source, spec.decoder)
        plan = plan_clips_of(reader, segment, spec.clip)
        return ActivationMap(
            run=self._run,
            segment=segment,
            values=values,
            frames=restore_frames(clip[0], spec.frame),
            times_s=plan.frame_times_s[entry // spec.frame.n_crops],
            class_name=classes[target],
            probability=float(probabilities[target]),
            layer=layer,
        )

    def _make_classifier(self, segment: Segment) -> Classify:
        """Make what computes logits [1, K] of a clip [1, C, T, H, W] of a segment, given its sound."""
        model = self._model
        if self._audio is None:
            return lambda clip: model.gated({CLIP: clip})
        ids = [segment.segment_id]
        maps, heard = self._audio.read_maps(ids), torch.from_numpy(self._audio.has_audio(ids))
        with torch.no_grad():
            gates = model.compute_gates(maps, heard)
            audio = None if model.objective is None else model.objective.audio(maps, heard)
        if model.objective is None:
            return lambda clip: model.gated({CLIP: clip}, gates)
        streams = cast(TwoStreams, model.objective.method.streams)

        def classify(clip: Tensor) -> Tensor:
            pooled = model.gated.compute_pooled({CLIP: clip}, gates).float()
            inputs = FeatureBatch({"pooled": pooled[:, None]}, cast(Tensor, audio), heard)
            return streams.classify(streams.encode(inputs, "target"), Dropouts())

        return classify


def compute_activation_map(
    network: EncoderNetwork, classify: Classify, clip: Tensor, target: int
) -> tuple[np.ndarray, str]:
    """Compute Grad-CAM of class `target` for one clip, float32 [1, C, T, H, W]; return [T, H, W] and the layer's name.

    `classify` runs the network and returns logits [1, K]. Activations of the network's last block are weighed by the
    mean gradient of the class's logit, summed over channels, what is below zero cut off, and interpolated (trilinear)
    to the clip's size. Of several paths the first is taken, SlowFast's slow one.
    """
    try:
        from captum.attr import LayerAttribution, LayerGradCam
    except ModuleNotFoundError as error:
        raise RunError("activation maps need captum; pip install 'captum>=0.8,<1'") from error

    name, layer = find_last_block(network, lambda: classify(clip))
    found = cast(Tensor, LayerGradCam(classify, layer).attribute(clip, target=target, relu_attributions=True))
    size: Any = tuple(clip.shape[2:])
    scaled = cast(Tensor, LayerAttribution.interpolate(found.detach(), size, interpolate_mode="trilinear"))
    return scaled[0, 0].numpy().astype(np.float32), name


def find_last_block(network: EncoderNetwork, run: Callable[[], Tensor]) -> tuple[str, nn.Module]:
    """Find the first module, outermost first, of the last stage before the classifier that returns [B, C, T, H, W].

    `run` runs the network once, which tells what modules return. Raises RunError where none returns that.
    """
    stage = tuple(network.stages)[-2]
    prefixes = network.stages[stage]
    found = [
        (name, module)
        for name, module in network.named_modules()
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
    ]
    returns_map: set[str] = set()

    def watch(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 5:
            returns_map.add(name)

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: watch(name, output))
        for name, module in found
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, module in sorted(found, key=lambda each: each[0].count(".")):
        if name in returns_map:
            return name, module
    raise RunError(f"no module of the stage {stage} of {type(network).__name__} returns a map in time and space")


def restore_frames(clip: Tensor, spec: FrameSpec) -> np.ndarray:
    """Restore the frames of a network's input, float32 [C, T, H, W], uint8 [T, H, W, 3]; of flow its two as grey."""
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (spec.mean, spec.std))
    frames = (clip * std + mean).clamp(0, 255).round().byte().permute(1, 2, 3, 0).numpy()
    if frames.shape[-1] == 3:
        return np.ascontiguousarray(frames)
    return np.repeat(frames.mean(axis=-1, keepdims=True).astype(np.uint8), 3, axis=-1)


def make_activation_maps(
    places: DataPlaces, runs_dir: Path, choice: RunChoice, segment_id: str, rows: Sequence[str] = (), target: str = ""
) -> Plot:
    """Draw class activation maps of a segment's middle clip (Planamente et al., Figure 6).

    `rows` are those of a grid whose runs are drawn one below the other; none: the last run that fits, and above it,
    where the choice names a method that Stage 1 was trained by end to end, the last one of the same shift and seed by
    `source_only`, if there is one. `target` "" is the class that each run finds most probable. Raises RunError where no
    run fits, MediaError where the segment can't be read, ManifestError for an unknown segment.
    """
    if not segment_id:
        raise ManifestError("a class activation map is of one segment; name it (--segment)")
    segment = find_segment(places.manifest, segment_id)
    records = [choose_stage1_run(runs_dir, replace(choice, row=row)) for row in rows]
    if not rows:
        records = [choose_stage1_run(runs_dir, choice)]
        if choice.method not in ("", SOURCE_ONLY):
            try:
                plain = RunChoice(records[0].shift, records[0].seed, None, SOURCE_ONLY)
                records.insert(0, choose_stage1_run(runs_dir, plain))
            except RunError:
                pass  # then the run is drawn alone
    with OpenMedia(places.media_root, places.card.media) as media:
        maps = [ActivationMapper(places, runs_dir, record).map(media, segment, target) for record in records]
        try:
            audio = read_segment_audio(media, segment, _RATE_HZ)
        except MediaNotFoundError:
            audio = None  # drawn as "no sound"
    return draw_activation_maps(maps, audio, f"{places.card.name}{' (synthetic)' if places.card.synthetic else ''}")


def draw_activation_maps(
    maps: Sequence[ActivationMap], audio: SegmentAudio | None, what: str, n_shown: int = N_SHOWN
) -> Plot:
    """Draw the clip's frames, its sound beneath, and one row of maps a run; `what` names the data set."""
    first = maps[0]
    shown = np.unique(np.linspace(0, len(first.frames) - 1, min(n_shown, len(first.frames))).round().astype(int))
    row_in = 9.6 / len(shown) * first.frames.shape[1] / first.frames.shape[2]
    heights = [row_in + 0.25, *[row_in + 0.3] * len(maps), 1.1]
    labels = ", ".join(first.segment.labels) or "no label"
    with plot_style():
        figure = make_figure(9.8, sum(heights) + 0.5, f"{first.segment.segment_id} ({labels}), {what}")
        rows: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
        times = [f"{time_s:.2f} s" for time_s in first.times_s[shown]]
        _draw_row(rows[0], first.frames[shown], "what the network sees", times)
        for row, each in zip(rows[1:-1], maps, strict=True):
            title = f"{each.run}: {each.class_name}, {100 * each.probability:.0f} %"
            title += "" if each.values.any() else " (nothing in the clip speaks for it)"
            _draw_row(row, overlay_map(each.frames, each.values)[shown], title, [""] * len(shown))
        axis = rows[-1].subplots()
        if audio is None:
            axis.text(0, 0.5, "no sound", transform=axis.transAxes, color=QUIET_COLOUR)
            axis.set_axis_off()
        else:
            draw_waveform(axis, audio)
            axis.axvspan(*first.times_s[[0, -1]].tolist(), color=QUIET_COLOUR, alpha=0.15, linewidth=0)
            axis.set_xlabel("seconds of the video; grey: the clip")
            axis.set_yticks([])
    numbers = {each.run: {"values": each.values, "class": each.class_name, "layer": each.layer} for each in maps}
    words = "; ".join(f"{each.run} sees {each.class_name}, {100 * each.probability:.0f} percent" for each in maps)
    description = f"Class activation maps over a clip of {first.segment.segment_id} ({labels}), {what}. {words}."
    return Plot(figure, numbers, description)


def overlay_map(frames: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Lay a map over frames, uint8 [T, H, W, 3]: the more it says, the less of the frame's own colour is left.

    The largest value of the clip is the end of the scale; a map of zeros leaves the frames as they are.
    """
    from matplotlib import colormaps

    top = float(values.max())
    scaled = values / top if top > 0 else np.zeros_like(values)
    colours = colormaps["inferno"](scaled)[..., :3] * 255
    opacity = (_OPACITY * scaled)[..., None]
    mixed: np.ndarray = np.rint(frames * (1 - opacity) + colours * opacity).astype(np.uint8)
    return mixed


def _draw_row(part: Any, frames: np.ndarray, title: str, names: Sequence[str]) -> None:
    part.suptitle(title, x=0.01, ha="left", fontsize=9)
    for axis, frame, name in zip(np.atleast_1d(part.subplots(1, len(frames))), frames, names, strict=True):
        axis.imshow(frame, interpolation="bilinear")
        axis.set_title(name, fontsize=8, loc="center")
        axis.set_axis_off()
