"""Runs one encoder on the clips of a shard in batches, on the device, in the precision the specification asks for."""

from __future__ import annotations

from functools import lru_cache

import torch

from echoshift.extract.encoders.inference_form import Precision, prepare_for_inference
from echoshift.extract.encoders.network import compute_outputs
from echoshift.extract.extraction_plan import StoreTarget
from echoshift.extract.shard_rows import ShardRows
from echoshift.extract.weights.load import WeightsRecord, load_any_encoder
from echoshift.pipeline.errors import MediaMemoryError, SpecError
from echoshift.pipeline.freed_memory import keep_freed_memory
from echoshift.pipeline.specs import FeatureSpec


def choose_batch(device: torch.device) -> int:
    """Return 1 clip a batch on a CPU, where more is slower, and 16 on a GPU."""
    return 16 if device.type == "cuda" else 1


@lru_cache(maxsize=8)
def load_network(encoder: str, weights: WeightsRecord, device: str) -> torch.nn.Module:
    """Load an encoder once a process."""
    return load_any_encoder(encoder, weights, torch.device(device))


@lru_cache(maxsize=8)
def load_inference_form(encoder: str, weights: WeightsRecord, device: str, precision: Precision) -> torch.nn.Module:
    """Load the form of an encoder that extraction runs, once a process; freed memory is kept from then on."""
    keep_freed_memory()
    return prepare_for_inference(load_network(encoder, weights, "cpu"), torch.device(device), precision)


class ShardEncoder:
    """Gathers clips of one store's shard, encodes them when a batch is full, and hands the outputs to their rows.

    On a GPU the outputs of a batch are fetched while the next one is computed.
    """

    def __init__(self, target: StoreTarget, rows: ShardRows, device: torch.device, n_clips_per_batch: int) -> None:
        self._spec: FeatureSpec = target.spec
        self._network = load_inference_form(target.spec.encoder, target.weights, str(device), target.spec.precision)
        self._device = device
        self._rows = rows
        self._n_clips_per_batch = n_clips_per_batch
        self._waiting: list[tuple[int, int, torch.Tensor]] = []
        self._under_way: tuple[list[tuple[int, int]], dict[str, torch.Tensor], torch.cuda.Event | None] | None = None

    def add(self, row: int, entry: int, tensor: torch.Tensor) -> None:
        """Take an entry's input, float32 [C, T, H, W] or [1, F, N], on the device."""
        self._waiting.append((row, entry, tensor))
        if len(self._waiting) >= self._n_clips_per_batch:
            self._start()
            if self._device.type != "cuda":
                self._fetch()

    def run(self) -> None:
        """Encode the clips that wait, and hand out everything."""
        self._start()
        self._fetch()

    def _start(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        try:
            outputs = self._encode(torch.stack([tensor for _, _, tensor in waiting]))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._fail(waiting, error)
            return
        self._fetch()
        event = None
        if self._device.type == "cuda":
            outputs = {name: _start_copy(value) for name, value in outputs.items()}
            event = torch.cuda.Event()
            event.record()
        self._under_way = ([(row, entry) for row, entry, _ in waiting], outputs, event)

    def _encode(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        names = [output.name for output in self._spec.outputs]
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False),
        ):
            outputs = compute_outputs(self._network, batch, names)
            found = {name: outputs[name].float() for name in names}
        for output in self._spec.outputs:
            if tuple(found[output.name].shape) != (len(batch), *output.shape):
                raise SpecError(
                    f"{self._spec.encoder} computes {output.name} of shape {list(found[output.name].shape[1:])}, its "
                    f"entry plans {list(output.shape)}; mend its output_shapes"
                )
        return found

    def _fetch(self) -> None:
        """Hand out the outputs of the batch that was started before."""
        if self._under_way is None:
            return
        (places, outputs, event), self._under_way = self._under_way, None
        if event is not None:
            event.synchronize()
        features = {name: value.numpy() for name, value in outputs.items()}
        for i, (row, entry) in enumerate(places):
            self._rows.put(row, entry, {name: values[i] for name, values in features.items()})

    def _fail(self, waiting: list[tuple[int, int, torch.Tensor]], error: Exception) -> None:
        """Fail the one row whose single clip is too large; a batch that is too large is the user's to make smaller."""
        where = f"{self._spec.encoder} on {self._device}"
        if len(waiting) > 1:
            raise SpecError(
                f"{where}: a batch of {len(waiting)} clips needs more memory than there is; "
                f"extract with --batch {len(waiting) // 2}"
            ) from error
        row, _, clip = waiting[0]
        reason = f"{where}: one clip {list(clip.shape)} needs more memory than there is"
        self._rows.fail_for(row, MediaMemoryError(reason))


def _start_copy(value: torch.Tensor) -> torch.Tensor:
    """Start copying a tensor of the GPU into pinned memory; it is there once an event recorded now has passed."""
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory, of the machine or of the GPU, didn't suffice."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)
    )
