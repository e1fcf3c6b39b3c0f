"""Training of the encoder by a method of train/alignment, end to end, in place of Stage 1's classifier and losses."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.train.alignment.method import build_method
from echoshift.train.features import FeatureBatch, FeatureShapes
from echoshift.train.loop import Dropouts, SourceFeatures, StepInputs, TargetFeatures
from echoshift.train.stage1.config import ObjectiveConfig

_VISUAL = "pooled"


class AudioBranch(nn.Module):
    """The audio network above the maps that the store holds: layer4 of ResNet-18, which trains."""

    def __init__(self, network: EncoderNetwork) -> None:
        super().__init__()
        self.network: EncoderNetwork = copy.deepcopy(network)
        self._trained = tuple(self.network.stages)[tuple(self.network.stages).index(network.split_stage) : -1]
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad = self.network.find_stage(name) in self._trained

    def forward(self, audio_map: Tensor, has_audio: Tensor) -> Tensor:
        """Compute a feature of maps [B, C, F, N], float32 [B, D]; zeros where `has_audio`, bool [B], is false.

        What is silent isn't computed, so that BatchNorm's statistics are those of audio.
        """
        features = audio_map.new_zeros(len(audio_map), self.network.n_classified)
        if has_audio.any():
            heard = self.network.features({"map": audio_map[has_audio]})["pooled"]
            features = features.to(heard.dtype).index_put((has_audio.nonzero()[:, 0],), heard)
        return features.float()

    def train(self, mode: bool = True) -> AudioBranch:
        """Set the mode of what trains; what is frozen stays in eval."""
        super().train(mode)
        self.network.eval()
        for stage in self._trained:
            for module in self.network.iterate_stage_modules(stage):
                module.training = mode
        return self

    def list_trained(self) -> dict[str, Tensor]:
        """Return what training changes by its name in `state_dict`, parameters and statistics."""
        prefix = "network."
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if self.network.find_stage(name.removeprefix(prefix)) in self._trained
        }


class FreshDropouts(Dropouts):
    """Dropout masks from torch's generator, which Stage 1 seeds for each epoch."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def draw_keep(self, shape: tuple[int, ...], p: float) -> Tensor:
        """Draw what is kept, float32 of 0 and 1 of this shape, each 0 with probability p."""
        return (torch.rand(shape, device=self._device) >= p).float()


class EncoderObjective(nn.Module):
    """A method of train/alignment on the features of the visual and the audio network.

    Its projections, classifiers and losses are the very ones that train on cached features; here their gradients reach
    the last stages of both networks, as in Planamente et al., section 4.
    """

    def __init__(self, audio: AudioBranch, method: nn.Module) -> None:
        super().__init__()
        self.audio = audio
        self.method = method

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The terms of the loss."""
        names: tuple[str, ...] = self.method.loss_names  # type: ignore[assignment]
        return names

    def compute_losses(
        self,
        visual: Tensor,
        audio_map: Tensor,
        has_audio: Tensor,
        labels: Tensor,
        domains: Tensor,
        progress: float,
    ) -> dict[str, Tensor]:
        """Compute the weighted terms by name, each float32 [], of a batch: first its source, then its target segments.

        Args:
            visual: pooled feature, float [B, C].
            audio_map: float [B, C_a, F, N].
            has_audio: bool [B].
            labels: of the source's n segments, int64 [n], or float32 [n, K] where the task is multi-label.
            domains: of the source's n segments, int64 [n].
            progress: the share of all steps that are done.
        """
        batch = FeatureBatch({_VISUAL: visual.float()[:, None]}, self.audio(audio_map, has_audio), has_audio)
        n = len(domains)
        own, other = (_cut(batch, rows) for rows in (slice(n), slice(n, None)))
        target = None
        if len(other.has_audio):
            unknown = labels.new_full((len(other.has_audio), *labels.shape[1:]), -1)
            target = TargetFeatures(other, unknown)
        step = StepInputs(
            SourceFeatures(own, labels, domains), target, None, torch.tensor(progress, device=visual.device)
        )
        values: Tensor = self.method.losses(step, FreshDropouts(visual.device))  # type: ignore[operator]
        return dict(zip(self.loss_names, values.unbind(), strict=True))

    def predict_clips(self, visual: Tensor, audio_map: Tensor, has_audio: Tensor) -> Tensor:
        """Predict the clips [n_clips, C] of one segment with its audio, probabilities float32 [n_clips, K]."""
        n_clips = len(visual)
        audio = self.audio(audio_map, has_audio).expand(n_clips, -1)
        batch = FeatureBatch({_VISUAL: visual.float()[:, None]}, audio, has_audio.expand(n_clips))
        found: Tensor = self.method.predict(batch, "target")  # type: ignore[operator]
        return found

    def list_trained(self) -> dict[str, Tensor]:
        """Return what training changes, by its name in checkpoints."""
        of_audio = {f"sound.{name}": tensor for name, tensor in self.audio.list_trained().items()}
        return of_audio | {f"method.{name}": tensor for name, tensor in self.method.state_dict().items()}


def build_objective(
    config: ObjectiveConfig,
    audio_network: EncoderNetwork,
    n_visual: int,
    n_classes: int,
    source_domains: Sequence[str],
    *,
    multi_label: bool,
    seed: int,
) -> EncoderObjective:
    """Build the objective on the audio network with its pretrained weights, which isn't changed."""
    audio = AudioBranch(audio_network)
    shapes = FeatureShapes(
        visual={_VISUAL: (n_visual,)},
        n_audio=audio.network.n_classified,
        n_sources=len(source_domains),
        multi_label=multi_label,
    )
    return EncoderObjective(audio, build_method(config, shapes, n_classes, seed))


def _cut(batch: FeatureBatch, rows: slice) -> FeatureBatch:
    visual = {name: values[rows] for name, values in batch.visual.items()}
    return FeatureBatch(visual, batch.audio[rows], batch.has_audio[rows])
