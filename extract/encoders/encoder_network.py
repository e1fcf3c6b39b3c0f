"""What every encoder network offers: a trunk, a head on top of it, and named outputs of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.suggestions import suggest


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
    """

    trunk_names: ClassVar[tuple[str, ...]]
    head_names: ClassVar[tuple[str, ...]]
    stages: ClassVar[Mapping[str, tuple[str, ...]]]
    split_stage: ClassVar[str]
    classified_output: ClassVar[str]

    @property
    @abstractmethod
    def trunk_channels(self) -> dict[str, int]:
        """The number of channels of each of the trunk's outputs, in the order of `trunk_names`."""

    @abstractmethod
    def trunk(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the activations at the split point, by the names in `trunk_names`."""

    @abstractmethod
    def head(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs named in `head_names` from the trunk's, which it leaves unchanged."""

    @abstractmethod
    def features(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute what `head` does, but without the classifier and its `logits`."""

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
        """Return the modules of a stage, those inside of them too."""
        for prefix in self.stages[stage]:
            yield from self.get_submodule(prefix).modules()

    def forward(self, x: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        """Compute exactly the named outputs, in the order asked for; the head runs only if one of its own is asked.

        x is the normalised float input: [B, C, T, H, W] for pictures, [B, 1, F, N] for spectrograms. Raises SpecError
        for a name the network hasn't got.
        """
        known = (*self.trunk_names, *self.head_names)
        for name in outputs:
            if name not in known:
                raise SpecError(f"{type(self).__name__} has no output {name!r}; {suggest(name, known, there='it has')}")
        computed = self.trunk(x)
        if any(name in self.head_names for name in outputs):
            computed = {**computed, **self.head(computed)}
        return {name: computed[name] for name in outputs}


def check_clip_shape(x: Tensor, n_channels: int, multiple_of: int = 1) -> None:
    """Raise SpecError unless x is [B, n_channels, T, H, W] with T a multiple of `multiple_of`."""
    if x.ndim != 5 or x.shape[1] != n_channels:
        raise SpecError(f"the network takes [B, {n_channels}, T, H, W], not {list(x.shape)}")
    if x.shape[2] % multiple_of:
        raise SpecError(f"the network takes a number of frames divisible by {multiple_of}, not {x.shape[2]}")
