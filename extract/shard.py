"""Computes one shard: reads media ahead in threads, encodes on the device, and writes features chunk by chunk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch

from echoshift.extract.clip_assembly import ClipAssembler
from echoshift.extract.extraction_plan import ExtractionPlan, ShardWork
from echoshift.extract.inference import ShardEncoder, choose_batch, is_out_of_memory
from echoshift.extract.output_writer import OutputWriter
from echoshift.extract.row_readers import RowReaders, choose_n_readers
from echoshift.extract.shard_inputs import (
    PictureFacts,
    PictureStretch,
    RowFailure,
    ShardInput,
    SoundEnd,
    SoundSpan,
    SoundWindow,
)
from echoshift.extract.shard_rows import ShardRows
from echoshift.extract.sound.spectrograms import log_spectrogram
from echoshift.extract.sound.views import list_views
from echoshift.pipeline.devices import resolve_device
from echoshift.pipeline.errors import MediaMemoryError
from echoshift.pipeline.execution import ShardReport
from echoshift.pipeline.store.interface import FeatureStore, ShardIndex
from echoshift.pipeline.store.open import open_store


def process_shard(
    plan: ExtractionPlan,
    work: ShardWork,
    stores: Mapping[str, FeatureStore] | None = None,
    notify: Callable[[int], None] = lambda n_rows: None,
) -> ShardReport:
    """Compute a shard's rows, write their features to the stores, and return the index that makes them count.

    Depends on plan, work and media alone, and may be run again at any time with the same result. `notify` is called
    with the number of rows read since the last call. Reading, computing and writing overlap, each at most a few inputs
    or chunks ahead of the next.
    """
    task = work.task
    if stores is None:
        stores = {path: open_store(path) for path in task.store_paths}
    device = resolve_device(plan.options.device)
    n_readers = plan.options.n_readers or choose_n_readers(device.type, os.cpu_count() or 1)
    with OutputWriter() as writer, RowReaders(plan, work, n_readers) as readers:
        computation = _Computation(plan, work, stores, device, writer)
        for item in readers:
            computation.take(item)
            if computation.n_rows_ended:
                notify(computation.n_rows_ended)
                computation.n_rows_ended = 0
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
        self._ids: dict[int, str] = {}
        self.n_rows_ended = 0
        for row, segment in enumerate(work.segments, start=work.task.shard.start_row):
            if segment is not None:
                self._ids[row] = segment.segment_id
            else:
                for rows in self._rows.values():
                    rows.skip(row)

    def take(self, item: ShardInput) -> None:
        """Take one input; one that is too large for the memory fails its row."""
        try:
            self._lead(item)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if isinstance(item, PictureStretch):
                paths = [path for path, spec in self._specs.items() if spec.frame is not None]
                what = f"{list(item.pictures.shape)} pictures"
            elif isinstance(item, SoundWindow):
                paths, what = [item.store_path], f"{len(item.samples)} samples"
            else:
                raise
            for path in paths:
                self._rows[path].fail_for(
                    item.row, MediaMemoryError(f"preparing {what} needs more memory than there is")
                )
            self._assembler.end(item.row)

    def _lead(self, item: ShardInput) -> None:
        if isinstance(item, PictureFacts):
            for path in item.store_paths:
                frame = self._specs[path].frame
                assert frame is not None, "pictures go to stores of pictures"
                self._rows[path].start_row(
                    item.row, item.times.repeat(frame.n_crops, axis=0), item.frames.repeat(frame.n_crops, axis=0)
                )
            self._assembler.begin(item)
        elif isinstance(item, PictureStretch):
            self._assembler.feed(item)
        elif isinstance(item, SoundSpan):
            n_views = self._specs[item.store_path].n_sound_views
            self._rows[item.store_path].start_row(
                item.row, item.times.repeat(n_views, axis=0), item.frames.repeat(n_views, axis=0)
            )
        elif isinstance(item, SoundWindow):
            spec = self._specs[item.store_path]
            assert spec.audio is not None, "sound goes to stores of sound"
            samples = torch.from_numpy(item.samples)[None].to(self._device)
            spectrogram = log_spectrogram(samples, spec.audio)[0]
            for entry, view in list_views(spectrogram, spec, self._ids[item.row], item.entry):
                self._encode(item.store_path, item.row, entry, view)
        elif isinstance(item, SoundEnd):
            self._rows[item.store_path].end_sound(item.row, item.has_audio, item.loudness_dbfs)
        elif isinstance(item, RowFailure):
            for path in item.store_paths:
                self._rows[path].fail(item.row, item.failure)
        else:
            self._assembler.end(item.row)
            self.n_rows_ended += 1

    def finish(self) -> dict[str, ShardIndex]:
        """Encode what still waits for a full batch, and return the stores' indices."""
        for encoder in self._encoders.values():
            encoder.run()
        return {path: rows.finish() for path, rows in self._rows.items()}

    def _encode(self, path: str, row: int, entry: int, clip: torch.Tensor) -> None:
        self._encoders[path].add(row, entry, clip)
