"""Runs one encoder on the clips of a shard in batches, on the device, in the precision the specification asks for."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from extract.encoders.encoder_network import EncoderNetwork
from extract.extraction_plan import StoreTarget
from extract.shard_rows import ShardRows
from extract.weights.resolve import WeightsRecord, load_encoder
from pipeline.errors import SpecError
from pipeline.specs import FeatureSpec

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """Turns auto, cpu, cuda or cuda:n into a device; raises SpecError when there is no such GPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise SpecError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:n") from error
    if chosen.type not in ("cpu", "cuda"):
        raise SpecError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:n")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise SpecError(f"{device} asked for, but torch finds {torch.cuda.device_count()} GPUs; use --device cpu")
    return chosen


def choose_batch(device: torch.device) -> int:
    """Gives 1 clip a batch on a CPU, where more is slower, and 16 on a GPU."""
    return 16 if device.type == "cuda" else 1


@lru_cache(maxsize=8)
def load_network(encoder: str, weights: WeightsRecord, device: str) -> EncoderNetwork:
    """Loads an encoder once a process."""
    return load_encoder(encoder, weights, torch.device(device))


class ShardEncoder:
    """Gathers clips of one store's shard, encodes them when a batch is full, and hands the outputs to their rows."""

    def __init__(self, target: StoreTarget, rows: ShardRows, device: torch.device, n_clips_per_batch: int) -> None:
        self._spec: FeatureSpec = target.spec
        self._network = load_network(target.spec.encoder, target.weights, str(device))
        self._device = device
        self._rows = rows
        self._n_clips_per_batch = n_clips_per_batch
        self._waiting: list[tuple[int, int, torch.Tensor]] = []

    def add(self, row: int, clip: int, tensor: torch.Tensor) -> None:
        """Takes a clip's input, float32 [C, T, H, W] or [1, F, N], on the device."""
        self._waiting.append((row, clip, tensor))
        if len(self._waiting) >= self._n_clips_per_batch:
            self.run()

    def run(self) -> None:
        """Encodes the clips that wait."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        batch = torch.stack([tensor for _, _, tensor in waiting])
        names = [output.name for output in self._spec.outputs]
        precision = AUTOCAST_DTYPES.get(self._spec.precision)
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, dtype=precision or torch.bfloat16, enabled=precision is not None),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False),
        ):
            outputs = self._network(batch, names)
        features: dict[str, np.ndarray] = {name: outputs[name].float().cpu().numpy() for name in names}
        for i, (row, clip, _) in enumerate(waiting):
            self._rows.put(row, clip, {name: values[i] for name, values in features.items()})
