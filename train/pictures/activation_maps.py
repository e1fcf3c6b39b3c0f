"""Computes class activation maps of a checkpoint of Stage 1 over a clip, by captum's Grad-CAM on the last block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from echoshift.extract.clips import plan_clips
from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.extract.open_media import OpenMedia
from echoshift.extract.weights.load import load_encoder
from echoshift.pipeline.errors import RunError
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.specs import FeatureSpec, FrameSpec, fingerprint
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.opening import list_stores, open_store
from echoshift.train.alignment.two_streams import TwoStreams
from echoshift.train.cached.batches import Dropouts, FeatureBatch
from echoshift.train.data_places import DataPlaces
from echoshift.train.runs import RunRecord
from echoshift.train.segment_view.gates import read_facts
from echoshift.train.segment_view.run_predictions import describe_run
from echoshift.train.splits import TRAIN, find_shift
from echoshift.train.stage1.audio_adaptive_encoder import build_encoder, read_checkpoint
from echoshift.train.stage1.clip_reading import read_clips
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage1.encoder_steps import CHECKPOINT
from echoshift.train.stage1.gated_encoder import CLIP
from echoshift.train.stage1.input_stores import choose_sound, choose_visual
from echoshift.train.stage1.sound_features import SoundFeatures

Classify = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ActivationMap:
    """Where in a clip a network sees a class (Selvaraju et al., ICCV 2017).

    Attributes:
        run: names the run.
        segment: whose middle clip it is.
        values: float32 [T, H, W], 0 where nothing speaks for the class; not scaled.
        pictures: what the network saw, uint8 [T, H, W, 3].
        times_s: of each picture, in seconds of the video, float64 [T].
        class_name, probability: the class that is asked for, and how probable the clip makes it.
        layer: the module whose activations are weighed.
    """

    run: str
    segment: Segment
    values: np.ndarray
    pictures: np.ndarray
    times_s: np.ndarray
    class_name: str
    probability: float
    layer: str


class ActivationMapper:
    """Makes activation maps with one checkpoint; for one thread.

    Where a method of alignment stands on the encoder, the logits are the method's. Raises RunError where the store of
    sound that the gates, or the method, are made for isn't in the cache.
    """

    def __init__(self, places: DataPlaces, runs_dir: Path, record: RunRecord) -> None:
        path = runs_dir / "steps" / f"encoder-{record.steps['encoder']}" / CHECKPOINT
        facts = read_facts(path)
        config = Stage1Config.model_validate_json(facts.config)
        self._places, self._run = places, describe_run(record)
        hears = config.attention.enabled or config.objective.enabled
        self._sound = SoundFeatures(_find_sound(places, facts.sound)) if hears else None
        choice = choose_visual(config.visual, places, config.visual.test_preset)
        self._spec: FeatureSpec = choice.spec
        sound_network = None
        if config.objective.enabled:
            sound_network = load_encoder(config.sound.encoder, choose_sound(config.sound).weights)
        source = find_shift(places.card, record.shift).source
        there = {segment.domain for segment in places.manifest if segment.split == TRAIN}
        self._model = build_encoder(
            load_encoder(config.visual.encoder, choice.weights),
            self._sound.map_shape[0] if self._sound is not None else 0,
            len(facts.classes),
            config,
            seed=0,
            sound_network=sound_network,
            source_domains=sorted(there & set(source)),
            multi_label=places.card.task == "multi-label",
        )
        read_checkpoint(path, self._model)
        self._model.eval()

    def map(self, media: OpenMedia, segment: Segment, class_name: str = "") -> ActivationMap:
        """Map a class over the middle clip of a segment; "" is the class that the clip makes most probable.

        Raises MediaError naming what can't be read, RunError for an unknown class.
        """
        classes = self._places.card.classes
        if class_name and class_name not in classes:
            raise RunError(f"{self._places.card.name} has no class {class_name!r}; it has {', '.join(classes)}")
        read = read_clips(media, segment, self._spec)
        entry = len(read.clips) // 2
        clip = read.clips[entry : entry + 1]
        classify = self._make_classifier(segment)
        with torch.no_grad():
            logits = classify(clip)[0]
        is_multi_label = self._places.card.task == "multi-label"
        probabilities = logits.sigmoid() if is_multi_label else logits.softmax(dim=0)
        target = classes.index(class_name) if class_name else int(logits.argmax())
        values, layer = compute_activation_map(self._model.gated.network, classify, clip, target)
        assert self._spec.frame is not None, "the visual encoder sees"
        return ActivationMap(
            run=self._run,
            segment=segment,
            values=values,
            pictures=restore_pictures(clip[0], self._spec.frame),
            times_s=self._plan_times(media, segment, entry),
            class_name=classes[target],
            probability=float(probabilities[target]),
            layer=layer,
        )

    def _make_classifier(self, segment: Segment) -> Classify:
        """Make what gives logits [1, K] of a clip [1, C, T, H, W] of a segment, whose sound is given."""
        model, gates = self._model, None
        if self._sound is None:
            return lambda clip: model.gated({CLIP: clip})
        ids = [segment.segment_id]
        maps, heard = self._sound.read_maps(ids), torch.from_numpy(self._sound.has_audio(ids))
        with torch.no_grad():
            gates = model.compute_gates(maps, heard)
            audio = None if model.objective is None else model.objective.sound(maps, heard)
        if model.objective is None:
            return lambda clip: model.gated({CLIP: clip}, gates)
        streams = cast(TwoStreams, model.objective.method.streams)

        def classify(clip: Tensor) -> Tensor:
            pooled = model.gated.compute_pooled({CLIP: clip}, gates).float()
            inputs = FeatureBatch({"pooled": pooled[:, None]}, cast(Tensor, audio), heard)
            return streams.classify(streams.encode(inputs, "target"), Dropouts())

        return classify

    def _plan_times(self, media: OpenMedia, segment: Segment, entry: int) -> np.ndarray:
        """Plan when the pictures of an entry are shown, as reading it does."""
        spec = self._spec
        assert spec.frame is not None, "the visual encoder sees"
        reader = media.open_pictures(segment, spec.frame.source, spec.decoder)
        plan = plan_clips(
            spec.clip,
            segment.start_s,
            segment.stop_s,
            reader.frame_times_s,
            reader.info.duration_s,
            segment.segment_id,
        )
        times_s: np.ndarray = plan.frame_times_s[entry // spec.frame.n_crops]
        return times_s


def compute_activation_map(
    network: EncoderNetwork, classify: Classify, clip: Tensor, target: int
) -> tuple[np.ndarray, str]:
    """Compute Grad-CAM of class `target` for one clip, float32 [1, C, T, H, W]; return [T, H, W] and the layer's name.

    `classify` runs the network and gives logits [1, K]. Activations of the network's last block are weighed by the mean
    gradient of the class's logit, summed over channels, what is below zero cut off, and interpolated (trilinear) to the
    clip's size. Of several paths the first is taken, SlowFast's slow one.
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
    """Find the first module, outermost first, of the last stage before the classifier that gives [B, C, T, H, W].

    `run` runs the network once, which tells what modules give. Raises RunError where none gives that.
    """
    stage = tuple(network.stages)[-2]
    found = [(name, module) for name, module in network.named_modules() if name and _is_within(network, stage, name)]
    found.sort(key=lambda each: each[0].count("."))
    gives_map: set[str] = set()

    def watch(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 5:
            gives_map.add(name)

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
    for name, module in found:
        if name in gives_map:
            return name, module
    raise RunError(f"no module of the stage {stage} of {type(network).__name__} gives a map in time and space")


def _is_within(network: EncoderNetwork, stage: str, name: str) -> bool:
    """Return whether a module is one of a stage's, or within one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in network.stages[stage])


def restore_pictures(clip: Tensor, spec: FrameSpec) -> np.ndarray:
    """Restore the pictures of a network's input, float32 [C, T, H, W], uint8 [T, H, W, 3]; of flow its two as grey."""
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (spec.mean, spec.std))
    pictures = (clip * std + mean).clamp(0, 255).round().byte().permute(1, 2, 3, 0).numpy()
    if pictures.shape[-1] == 3:
        return np.ascontiguousarray(pictures)
    return np.repeat(pictures.mean(axis=-1, keepdims=True).astype(np.uint8), 3, axis=-1)


def _find_sound(places: DataPlaces, name: str) -> FeatureStore:
    for path in list_stores(places.cache_dir):
        store = open_store(path)
        if fingerprint(store.spec) == name and store.attributes["dataset"] == places.card.name:
            return store
    raise RunError(f"the store of sound {name}, of which gates are made, isn't in {places.cache_dir}; say --cache")
