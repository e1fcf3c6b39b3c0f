"""Computes the gates that a trained audio-based attention makes of a segment's sound, from a checkpoint of Stage 1."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from echoshift.pipeline.errors import WeightsError
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.tensor_files import check_tensors, read_header, read_tensors
from echoshift.train.segment_view.view import Channel, GateGroup
from echoshift.train.stage1.audio import AudioFeatures
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage1.encoder import AudioAttention, CheckpointFacts

N_EXTREME = 5
_ATTENTION = "attention."


class CheckpointGates:
    """The attention of one checkpoint and the store of sound whose maps it hears.

    Raises WeightsError for a file that is no checkpoint of Stage 1 or has changed, or has no attention.
    """

    def __init__(self, path: Path, store: FeatureStore) -> None:
        self.path = path
        self._sound = AudioFeatures(store)
        header, tensors = read_header(path), read_tensors(path)
        facts = read_facts(path)
        if facts.identify(tensors) != header["identity"]:
            raise WeightsError(f"{path} has changed since it was written; run Stage 1 again")
        own = {name.removeprefix(_ATTENTION): t for name, t in tensors.items() if name.startswith(_ATTENTION)}
        if not own:
            raise WeightsError(f"{path} was trained without attention, so that nothing is gated")
        config = Stage1Config.model_validate_json(facts.config)
        channels = {
            name.split(".")[1]: len(tensor)
            for name, tensor in own.items()
            if name.startswith("heads.") and name.endswith(".bias")
        }
        self._attention = AudioAttention(self._sound.map_shape[0], channels, config.attention).eval()
        check_tensors(own, self._attention.state_dict(), str(path))
        self._attention.load_state_dict(own)

    @torch.inference_mode()
    def compute(self, segment_id: str) -> tuple[bool, Mapping[str, np.ndarray]]:
        """Return whether the segment is heard, and its gates by path, float32 [n_channels].

        Raises StoreError for a segment that the store of sound hasn't, or whose row isn't done.
        """
        has_audio = self._sound.has_audio([segment_id])
        gates = self._attention(self._sound.read_maps([segment_id]), torch.from_numpy(has_audio))
        return bool(has_audio[0]), {name: gate[0].numpy() for name, gate in gates.items()}


def read_facts(path: Path) -> CheckpointFacts:
    """Read what a checkpoint says of itself; raises WeightsError where it is none."""
    header = read_header(path)
    try:
        return CheckpointFacts(
            header["encoder"],
            header["weights"],
            header["sound_weights"],
            header["sound"],
            tuple(json.loads(header["classes"])),
            header["config"],
        )
    except KeyError as error:
        raise WeightsError(f"{path} is no checkpoint of an audio-adaptive encoder; run Stage 1 again") from error


def summarise_gates(name: str, values: np.ndarray) -> GateGroup:
    """Summarise the gates of one path, float [n_channels]: mean, spread, and the N_EXTREME channels at either end.

    Of equal gates the channel of the lower number comes first.
    """
    upwards = np.argsort(values, kind="stable")[:N_EXTREME]
    downwards = np.argsort(-values, kind="stable")[:N_EXTREME]
    return GateGroup(
        name=name,
        values=values,
        mean=float(values.mean(dtype=np.float64)),
        spread=float(values.std(dtype=np.float64)),
        most_open=tuple(Channel(int(i), float(values[i])) for i in downwards),
        most_closed=tuple(Channel(int(i), float(values[i])) for i in upwards),
    )
