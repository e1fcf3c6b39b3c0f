"""Chooses whose spectrogram is shown: that of the dataset's encoder of sound, as it was extracted where it was."""

from __future__ import annotations

from collections.abc import Sequence

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.recipes import ZHANG2022
from echoshift.pipeline.cards import DatasetCard
from echoshift.pipeline.specs import ClipSpec, FeatureSpec, OutputSpec


def choose_sound_spec(card: DatasetCard, stored: Sequence[FeatureSpec]) -> tuple[FeatureSpec, bool]:
    """Return the specification of an encoder of sound, and whether something was extracted by it.

    Of several stores the one of the encoder that the card names first. Where nothing of sound was extracted it is the
    recipe of Zhang et al. (METHODS section 3), of no encoder.
    """
    hearing = [spec for spec in stored if spec.audio is not None]
    order = {name: place for place, name in enumerate(card.encoders) if find_encoder(name).modality == "audio"}
    if hearing:
        return min(hearing, key=lambda spec: order.get(spec.encoder, len(order))), True
    nothing = OutputSpec(name="map", shape=(1,))
    return FeatureSpec(
        encoder="none", weights="none", clip=ClipSpec(n_frames=1), audio=ZHANG2022, outputs=(nothing,)
    ), False
