"""Defines what every encoder network offers: a trunk, a head on top of it, and named outputs of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from pipeline.errors import SpecError


class EncoderNetwork(nn.Module, ABC):
    """Is a whole classification network cut in two where the audio-based attention acts (METHODS 4 and 5.5).

    `trunk` is what Stage 1 keeps frozen, `head` is the rest, pooling and classifier included. Every output has a name;
    those of the trunk are among them, so that they can be stored.
    """

    trunk_names: ClassVar[tuple[str, ...]]
    head_names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def trunk(self, x: Tensor) -> dict[str, Tensor]:
        """Computes the activations at the split point, by the names in `trunk_names`."""

    @abstractmethod
    def head(self, trunk_outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes the outputs named in `head_names` from the trunk's, which it leaves unchanged."""

    def forward(self, x: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        """Computes exactly the named outputs, in the order asked for; the head runs only if one of its own is asked.

        x is the normalised float input: [B, C, T, H, W] for pictures, [B, 1, F, N] for spectrograms. Raises SpecError
        for a name the network hasn't got.
        """
        known = (*self.trunk_names, *self.head_names)
        for name in outputs:
            if name not in known:
                raise SpecError(f"{type(self).__name__} has no output {name!r}; it has {', '.join(known)}")
        computed = self.trunk(x)
        if any(name in self.head_names for name in outputs):
            computed = {**computed, **self.head(computed)}
        return {name: computed[name] for name in outputs}


def check_clip_shape(x: Tensor, n_channels: int, multiple_of: int = 1) -> None:
    """Raises SpecError unless x is [B, n_channels, T, H, W] with T a multiple of `multiple_of`."""
    if x.ndim != 5 or x.shape[1] != n_channels:
        raise SpecError(f"the network takes [B, {n_channels}, T, H, W], not {list(x.shape)}")
    if x.shape[2] % multiple_of:
        raise SpecError(f"the network takes a number of frames divisible by {multiple_of}, not {x.shape[2]}")
