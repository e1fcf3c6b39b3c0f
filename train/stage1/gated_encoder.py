"""Holds the visual encoder that Stage 1 trains: a network gated where it is split, with a classifier of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from echoshift.extract.encoders.inference_form import Precision, prepare_for_inference
from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.pipeline.errors import SpecError, WeightsError, suggest

BatchNormMode = Literal["eval", "train"]

CLIP = "clip"
LOGITS = "logits"
SPLIT = "split"
CLASSIFIER = "classifier"
_PRECISIONS: Mapping[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class GatedEncoder(nn.Module):
    """An encoder network whose trunk's channels are multiplied by gates, and which classifies by itself.

    Logits: the network's `classified_output` (an average over all positions), dropout, one Linear to `n_classes`, as
    PyTorch initialises it (seed torch before), in float32 under any autocast. The network's own classifier isn't used.

    `trainable_from` names the first stage whose weights train (`split`: the one after the split); the stages before it
    are frozen. `batch_norm` is the mode of the frozen stages' BatchNorm in training: `eval` uses its running statistics
    as they are, `train` those of the batch, and updates them. The trained stages' BatchNorm trains. Outside training
    (`.eval()`) every norm uses its running statistics. Raises SpecError for an unknown stage.

    A trunk that is frozen whole runs without gradients and, where its norms are fixed, in the inference form, which
    gives the same activations up to rounding (extract/encoders/inference_form.py), in autocast's precision.
    The network given belongs to this module from then on.
    """

    def __init__(
        self,
        network: EncoderNetwork,
        n_classes: int,
        trainable_from: str = SPLIT,
        batch_norm: BatchNormMode = "eval",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.network = network
        self.batch_norm = batch_norm
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(network.n_classified, n_classes))
        self._stages = tuple(network.stages)
        first = self._find_first(trainable_from)
        self.trained_stages = self._stages[first:-1]
        self.trainable_from = self._stages[first]
        self.has_frozen_trunk = first >= self._stages.index(network.split_stage)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(network.find_stage(name) in self.trained_stages)
        self._form: tuple[torch.device, Precision, EncoderNetwork] | None = None
        self.register_load_state_dict_post_hook(_forget_form)
        self.train(self.training)

    @property
    def gate_channels(self) -> dict[str, int]:
        """The gates that the network takes: the number of channels of each of the trunk's outputs."""
        return self.network.trunk_channels

    def train(self, mode: bool = True) -> GatedEncoder:
        """Switch training on or off; frozen stages are as `batch_norm` says."""
        super().train(mode)
        for stage in self._stages:
            if stage in self.trained_stages:
                continue
            has_batch_statistics = mode and self.batch_norm == "train" and stage != CLASSIFIER
            for module in self.network.iterate_stage_modules(stage):
                module.training = has_batch_statistics and isinstance(module, _BatchNorm)
        return self

    def forward(self, visual: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None = None) -> Tensor:
        """Compute logits, float32 [B, n_classes].

        `visual` is either {"clip": [B, C, T, H, W]} or the trunk's outputs by name, as the level-2 cache holds them.
        `gates` are one for each of the trunk's outputs, [B, channels] or [1, channels], None where nothing is gated.
        Raises SpecError for the trunk's outputs where the trunk, or its statistics, are to train.
        """
        return self._classify(self._compute_features(visual, gates))

    def compute_pooled(self, visual: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None = None) -> Tensor:
        """Compute what `forward` classifies, [B, n_classified]; inputs as there."""
        return self._compute_features(visual, gates)[self.network.classified_output]

    def check_cached_trunk(self) -> None:
        """Raise SpecError where the trunk, or its statistics, are to train, so that it can't come from the cache."""
        split = self.network.split_stage
        if not self.has_frozen_trunk:
            raise SpecError(
                f"the trunk comes from the cache, but weights train from {self.trainable_from} on, before the split at "
                f"{split}; use visual.mode = 'frames', or training.trainable_from = {SPLIT!r}"
            )
        if self.batch_norm == "train":
            raise SpecError(
                "the trunk comes from the cache, where its BatchNorm can't train; use visual.mode = 'frames', or "
                "training.batch_norm = 'eval'"
            )

    @torch.no_grad()
    def encode(
        self, visual: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None, outputs: Sequence[str]
    ) -> dict[str, Tensor]:
        """Compute the named outputs of the network's head, and `logits`, which are those of this module.

        Without gradients; of use after `.eval()`. Inputs as for `forward`; raises SpecError for an unknown output.
        """
        for name in outputs:
            if name not in self.network.head_names:
                kind = type(self.network).__name__
                hint = suggest(name, self.network.head_names, there="it has")
                raise SpecError(f"the head of {kind} has no output {name!r}; {hint}")
        features = self._compute_features(visual, gates)
        if LOGITS in outputs:
            features[LOGITS] = self._classify(features)
        return {name: features[name] for name in outputs}

    def compute_trunk(self, visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the trunk's outputs, before any gate, or take them as they come; inputs as for `forward`."""
        names = self.network.trunk_names
        if set(visual) == set(names):
            self.check_cached_trunk()
            return {name: visual[name] for name in names}
        if set(visual) != {CLIP}:
            raise SpecError(f"inputs {', '.join(visual) or 'none'}; the encoder takes {CLIP}, or {', '.join(names)}")
        clip = visual[CLIP]
        if not self.has_frozen_trunk:
            return self.network.trunk(clip)
        with torch.no_grad():
            if self.batch_norm == "train":
                return self.network.trunk(clip)
            return self._get_form(clip.device).trunk(clip)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return what training changes, by its name in `state_dict`: what a checkpoint holds, on the module's device.

        Parameters and buffers of the trained stages and the classifier, and, with batch_norm = `train`, the buffers of
        the frozen stages. They are the tensors themselves, not copies.
        """
        buffers = {name for name, _ in self.named_buffers()}
        return {
            name: value.detach() for name, value in self.state_dict().items() if self._is_changed(name, name in buffers)
        }

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `trainable_state` gave; raises WeightsError unless names and shapes are the same."""
        own = self.trainable_state()
        for name in [*own, *state]:
            if name not in state or name not in own or own[name].shape != state[name].shape:
                given, expected = (list(s[name].shape) if name in s else "none" for s in (state, own))
                raise WeightsError(
                    f"the encoder's checkpoint doesn't fit: {name} is {given}, expected {expected}; "
                    "it was trained with another encoder, number of classes, trainable_from or batch_norm"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def _find_first(self, trainable_from: str) -> int:
        name = self.network.split_stage if trainable_from == SPLIT else trainable_from
        if name not in self._stages:
            kind = type(self.network).__name__
            raise SpecError(
                f"trainable_from: {kind} has no stage {name!r}; it has {SPLIT} (= {self.network.split_stage}), "
                + ", ".join(self._stages)
            )
        return self._stages.index(name)

    def _is_changed(self, name: str, is_buffer: bool) -> bool:
        inner = name.removeprefix("network.")
        if inner == name:
            return True
        stage = self.network.find_stage(inner)
        return stage in self.trained_stages or (is_buffer and self.batch_norm == "train" and stage != CLASSIFIER)

    def _classify(self, features: Mapping[str, Tensor]) -> Tensor:
        pooled = features[self.network.classified_output]
        with torch.autocast(pooled.device.type, enabled=False):
            logits: Tensor = self.classifier(pooled)
        return logits

    def _compute_features(self, visual: Mapping[str, Tensor], gates: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        trunk = self.compute_trunk(visual)
        if gates is None:
            return self.network.features(trunk)
        if set(gates) != set(trunk):
            raise SpecError(f"gates for {', '.join(gates) or 'nothing'}; the network takes some for {', '.join(trunk)}")
        return self.network.features({name: gate_channels(x, gates[name]) for name, x in trunk.items()})

    def _get_form(self, device: torch.device) -> EncoderNetwork:
        precision: Precision = "fp32"
        if torch.is_autocast_enabled(device.type):
            precision = _PRECISIONS.get(torch.get_autocast_dtype(device.type), "fp32")
        if self._form is None or self._form[:2] != (device, precision):
            form = prepare_for_inference(self.network, device, precision)
            for stage in self._stages[self._stages.index(form.split_stage) :]:
                for prefix in form.stages[stage]:  # the form runs the trunk alone
                    parent, _, leaf = prefix.rpartition(".")
                    setattr(form.get_submodule(parent), leaf, nn.Identity())
            self._form = (device, precision, form)
        return self._form[2]


def gate_channels(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply the channels of x, [B, C, ...], by a gate, [B, C] or [1, C]; raises SpecError for other shapes."""
    if gate.ndim != 2 or gate.shape[0] not in (1, x.shape[0]) or gate.shape[1] != x.shape[1]:
        raise SpecError(f"a gate of {list(gate.shape)} doesn't fit activations of {list(x.shape)}")
    return x * gate[(..., *[None] * (x.ndim - 2))]


def _forget_form(module: Any, _incompatible_keys: Any) -> None:
    module._form = None
