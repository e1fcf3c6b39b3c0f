"""Computes one shard: reads media ahead in threads, encodes on the device, and writes features chunk by chunk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from echoshift.extract.audio import list_views, log_spectrogram
from echoshift.extract.encoders.inference_form import Precision, prepare_for_inference
from echoshift.extract.encoders.network import compute_outputs
from echoshift.extract.frames import ClipAssembler
from echoshift.extract.rows import (
    AudioEnd,
    AudioSpan,
    AudioWindow,
    FrameClips,
    FrameStretch,
    RowFailure,
    RowInput,
    RowReaders,
    choose_n_readers,
)
from echoshift.extract.shard_rows import OutputWriter, ShardRows
from echoshift.extract.weights.load import WeightsRecord, load_any_encoder
from echoshift.extract.work import ExtractionPlan, ShardWork, StoreTarget
from echoshift.pipeline.devices import keep_freed_memory, resolve_device
from echoshift.pipeline.errors import MediaMemoryError, SpecError
from echoshift.pipeline.execution import ShardReport
from echoshift.pipeline.store.interface import FeatureStore, ShardIndex


def process_shard(
    plan: ExtractionPlan,
    work: ShardWork,
    stores: Mapping[str, FeatureStore],
    notify: Callable[[int], None] = lambda n_rows: None,
) -> ShardReport:
    """Compute a shard's rows, write their features to the stores, and return the index that makes them count.

    Depends on plan, work and media alone, and may be run again at any time with the same result. `notify` is called
    with the number of rows read since the last call. Reading, computing and writing overlap, each at most a few inputs
    or chunks ahead of the next.
    """
    task = work.task
    device = resolve_device(plan.options.device)
    n_readers = plan.options.n_readers or choose_n_readers(device.type, os.cpu_count() or 1)
    with OutputWriter() as writer, RowReaders(plan, work, n_readers) as readers:
        computation = _Computation(plan, work, stores, device, writer)
        for row, item in readers:
            if item is None:
                computation.end_row()
                notify(1)
            else:
                computation.take(row, item)
        indices = computation.finish()
    return ShardReport(task, {path: indices[path] for path in task.store_paths})


class _Computation:
    """A shard under way: leads each input to where it belongs."""

    def __init__(
        self,
        plan: ExtractionPlan,
        work: ShardWork,
        stores: Mapping[str, FeatureStore],
        device: torch.device,
        writer: OutputWriter,
    ) -> None:
        paths = work.task.store_paths
        self._device = device
        self._specs = {path: plan.targets[path].spec for path in paths}
        self._rows = {path: ShardRows(stores[path], work, writer) for path in paths}
        n_batch = plan.options.n_clips_per_batch or choose_batch(device)
        self._encoders = {path: ShardEncoder(plan.targets[path], self._rows[path], device, n_batch) for path in paths}
        self._assembler = ClipAssembler(self._specs, device, self._encode)
        self._segments = dict(enumerate(work.segments, start=work.task.shard.start_row))
        self._row = work.task.shard.start_row
        for row in (row for row, segment in self._segments.items() if segment is None):
            for rows in self._rows.values():
                rows.skip(row)

    def take(self, row: int, item: RowInput) -> None:
        """Take one input of a row; one that is too large for the memory fails the row."""
        self._row = row
        try:
            self._lead(item)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if isinstance(item, FrameStretch):
                paths = [path for path, spec in self._specs.items() if spec.frame is not None]
                what = f"{list(item.frames.shape)} frames"
            elif isinstance(item, AudioWindow):
                paths, what = [item.store_path], f"{len(item.samples)} samples"
            else:
                raise
            for path in paths:
                self._rows[path].fail_for(row, MediaMemoryError(f"preparing {what} needs more memory than there is"))
            self._assembler.end()

    def _lead(self, item: RowInput) -> None:
        if isinstance(item, FrameClips):
            for path in item.store_paths:
                n_crops = self._specs[path].n_entries_per_clip // item.clip.n_views
                self._rows[path].start_row(self._row, item.times.repeat(n_crops, 0), item.spans.repeat(n_crops, 0))
            self._assembler.begin(item)
        elif isinstance(item, FrameStretch):
            self._assembler.feed(item)
        elif isinstance(item, AudioSpan):
            n_views = self._specs[item.store_path].n_sound_views
            self._rows[item.store_path].start_row(
                self._row, item.times.repeat(n_views, 0), item.spans.repeat(n_views, 0)
            )
        elif isinstance(item, AudioWindow):
            spec, segment = self._specs[item.store_path], self._segments[self._row]
            assert spec.audio is not None and segment is not None, "audio of a segment goes to stores of audio"
            samples = torch.from_numpy(item.samples)[None].to(self._device)
            spectrogram = log_spectrogram(samples, spec.audio)[0]
            for entry, view in list_views(spectrogram, spec, segment.segment_id, item.number):
                self._encode(item.store_path, entry, view)
        elif isinstance(item, AudioEnd):
            self._rows[item.store_path].end_audio(self._row, item.has_audio, item.loudness_dbfs)
        else:
            assert isinstance(item, RowFailure)
            for path in item.store_paths:
                self._rows[path].fail(self._row, item.failure)

    def end_row(self) -> None:
        """Note that all inputs of a row have been taken."""
        self._assembler.end()

    def finish(self) -> dict[str, ShardIndex]:
        """Encode what still waits for a full batch, and return the stores' indices."""
        for encoder in self._encoders.values():
            encoder.run()
        return {path: rows.finish() for path, rows in self._rows.items()}

    def _encode(self, path: str, entry: int, clip: Tensor) -> None:
        self._encoders[path].add(self._row, entry, clip)


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
    """One encoder at work on the clips of one store's shard, in batches whose outputs go to their rows.

    On a GPU the outputs of a batch are fetched while the next one is computed.
    """

    def __init__(self, target: StoreTarget, rows: ShardRows, device: torch.device, n_clips_per_batch: int) -> None:
        self._spec = target.spec
        self._network = load_inference_form(target.spec.encoder, target.weights, str(device), target.spec.precision)
        self._device = device
        self._rows = rows
        self._n_clips_per_batch = n_clips_per_batch
        self._waiting: list[tuple[int, int, Tensor]] = []
        self._under_way: tuple[list[tuple[int, int]], dict[str, Tensor], torch.cuda.Event | None] | None = None

    def add(self, row: int, entry: int, tensor: Tensor) -> None:
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
            # A copy into pinned memory is there once an event recorded now has passed.
            outputs = {
                name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
                for name, value in outputs.items()
            }
            event = torch.cuda.Event()
            event.record()
        self._under_way = ([(row, entry) for row, entry, _ in waiting], outputs, event)

    def _encode(self, batch: Tensor) -> dict[str, Tensor]:
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

    def _fail(self, waiting: list[tuple[int, int, Tensor]], error: Exception) -> None:
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


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory, of the machine or of the GPU, didn't suffice."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)
    )
