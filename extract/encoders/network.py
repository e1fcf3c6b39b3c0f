"""What an encoder's network offers: named outputs, and for Stage 1 a trunk and a head on top of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from echoshift.pipeline.errors import SpecError, suggest


class EncoderNetwork(nn.Module, ABC):
    """A whole classification network cut in two where the audio-based attention acts (METHODS 4 and 5.5).

    `trunk` is what Stage 1 keeps frozen, `head` is the rest, pooling and classifier included. Every output has a name;
    those of the trunk are among them, so that they can be stored.

    Attributes:
        trunk_names, head_names: the outputs.
        stages: the parts that weights train or freeze by, first to last: name and the prefixes (without the last dot)
            of their modules; together they hold every parameter and buffer once. The last one is `classifier`.
        split_stage: the first stage of the head.
        classified_output: the one of `head_names` that the classifier sees: averaged over all positions.
        trunk_channels: the number of channels of each of the trunk's outputs, in the order of `trunk_names`.
    """

    trunk_names: ClassVar[tuple[str, ...]]
    head_names: ClassVar[tuple[str, ...]]
    stages: ClassVar[Mapping[str, tuple[str, ...]]]
    split_stage: ClassVar[str]
    classified_output: ClassVar[str]
    trunk_channels: ClassVar[dict[str, int]]

    @abstractmethod
    def trunk(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the activations at the split point, by the names in `trunk_names`."""

    @abstractmethod
    def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs named in `head_names` but for `logits` from the trunk's, which it leaves unchanged."""

    def classify(self, features: Tensor) -> Tensor:
        """Compute the logits from `classified_output`."""
        raise NotImplementedError(f"{type(self).__name__} has neither `classify` nor a `head` of its own")

    def head(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute all outputs named in `head_names`: those of `features`, and the classifier's `logits`."""
        features = self.features(trunk_outputs)
        return {**features, "logits": self.classify(features[self.classified_output])}

    def fuse(self, dtype: torch.dtype) -> bool:
        """Turn this network into its inference form (inference_form.py) in place, with convolutions in `dtype`.

        Returns False where the network has none, as here.
        """
        return False

    @property
    def n_classified(self) -> int:
        """The number of channels of `classified_output`."""
        *_, (prefix,) = self.stages.values()
        weight = next(p for name, p in self.named_parameters() if name.startswith(f"{prefix}.") and p.ndim > 1)
        return weight.shape[1]

    def find_stage(self, name: str) -> str:
        """Find the stage of a parameter, a buffer or a module by its full name; raises SpecError where none has it."""
        for stage, prefixes in self.stages.items():
            if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
                return stage
        raise SpecError(f"{type(self).__name__} has no stage for {name!r}; {suggest(name, self.stages)}")

    def iterate_stage_modules(self, stage: str) -> Iterator[nn.Module]:
        """Iterate over the modules of a stage, those inside of them too."""
        for prefix in self.stages[stage]:
            yield from self.get_submodule(prefix).modules()

    def forward(self, x: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        """Compute exactly the named outputs, in the order asked for; the head runs only if one of its own is asked.

        x is the normalised float input: [B, C, T, H, W] for frames, [B, 1, F, N] for spectrograms. Raises SpecError
        for a name that the network doesn't have.
        """
        known = (*self.trunk_names, *self.head_names)
        for name in outputs:
            if name not in known:
                raise SpecError(f"{type(self).__name__} has no output {name!r}; {suggest(name, known, there='it has')}")
        computed = self.trunk(x)
        if any(name in self.head_names for name in outputs):
            computed = {**computed, **self.head(computed)}
        return {name: computed[name] for name in outputs}


def compute_outputs(network: nn.Module, x: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """Compute the named outputs of any encoder's network, in the order asked for.

    Of a network without trunk and head, what its forward returns: a mapping of names to tensors, or one tensor, which
    is `pooled`. Raises SpecError for a name that it doesn't return.
    """
    if isinstance(network, EncoderNetwork):
        return network(x, outputs)
    found = network(x)
    named = {"pooled": found} if isinstance(found, Tensor) else found
    kind = type(network).__name__
    if not isinstance(named, Mapping):
        raise SpecError(
            f"{kind} returns a {type(found).__name__}; forward returns a tensor, or a dict of named tensors"
        )
    for name in outputs:
        if name not in named:
            raise SpecError(f"{kind} returns no {name!r}, which its entry plans; it returns {', '.join(named)}")
    return {name: named[name] for name in outputs}


def require_trunk(network: nn.Module, encoder: str) -> EncoderNetwork:
    """Return the network if it has a trunk and a head; raises SpecError if it only extracts."""
    if not isinstance(network, EncoderNetwork):
        raise SpecError(f"{encoder} has no trunk: it only extracts, Stage 1 can't train it")
    return network


def check_clip_shape(x: Tensor, n_channels: int, multiple_of: int = 1) -> None:
    """Raise SpecError unless x is [B, n_channels, T, H, W] with T a multiple of `multiple_of`."""
    if x.ndim != 5 or x.shape[1] != n_channels:
        raise SpecError(f"the network takes [B, {n_channels}, T, H, W], not {list(x.shape)}")
    if x.shape[2] % multiple_of:
        raise SpecError(f"the network takes a number of frames divisible by {multiple_of}, not {x.shape[2]}")


def check_spectrogram_shape(x: Tensor) -> None:
    """Raise SpecError unless x is [B, 1, F, N]."""
    if x.ndim != 4 or x.shape[1] != 1:
        raise SpecError(f"the network takes [B, 1, F, N], not {list(x.shape)}")
