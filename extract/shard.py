"""Computes one shard: reads media ahead in threads, encodes on the device, and writes features chunk by chunk."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
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
from echoshift.extract.weights.load import WeightsRecord, load_any_encoder
from echoshift.extract.work import ExtractionPlan, ShardWork, StoreTarget
from echoshift.pipeline.devices import keep_freed_memory, resolve_device
from echoshift.pipeline.errors import MediaError, MediaMemoryError, SpecError
from echoshift.pipeline.execution import ShardReport
from echoshift.pipeline.store.interface import Failure, FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import DONE, FAILED, N_DIGEST_BYTES, PENDING, ROW_ARRAYS

N_CHUNKS_AHEAD = 4


def process_shard(
    plan: ExtractionPlan,
    work: ShardWork,
    stores: Mapping[str, FeatureStore],
    notify: Callable[[int], None] = lambda n_rows: None,
) -> ShardReport:
    """Compute a shard's rows, write their features to the stores, and return the index that makes them count.

    Depends on plan, work and media alone, and may be run again at any time with the same result. `notify` is called
    with the number of rows read since the last call, and at the end with that of the rows that needn't be read.
    Reading, computing and writing overlap, each at most a few inputs or chunks ahead of the next.
    """
    task = work.task
    device = resolve_device(plan.options.device)
    n_readers = plan.options.n_readers or choose_n_readers(device.type, os.cpu_count() or 1)
    with OutputWriter() as writer, RowReaders(plan, work, n_readers) as readers:
        computation = _Computation(plan, work, stores, device, writer)
        n_unread = task.shard.n_rows
        for row, item in readers:
            if item is None:
                computation.assembler.end()
                n_unread -= 1
                notify(1)
            else:
                computation.take(row, item)
        for encoder in computation.encoders.values():  # what still waits for a full batch
            encoder.run()
        if n_unread:  # rows that are kept, or have left the manifest
            notify(n_unread)
        return ShardReport(task, {path: rows.finish() for path, rows in computation.rows.items()})


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
        self.rows = {path: ShardRows(stores[path], work, writer) for path in paths}
        n_batch = plan.options.n_clips_per_batch or choose_batch(device)
        self.encoders = {path: ShardEncoder(plan.targets[path], self.rows[path], device, n_batch) for path in paths}
        self.assembler = ClipAssembler(self._specs, device, self._encode)
        self._segments = dict(enumerate(work.segments, start=work.task.shard.start_row))
        self._row = work.task.shard.start_row

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
                self.rows[path].fail_for(row, MediaMemoryError(f"preparing {what} needs more memory than there is"))
            self.assembler.end()

    def _lead(self, item: RowInput) -> None:
        if isinstance(item, FrameClips):
            for path in item.store_paths:
                n_crops = self._specs[path].n_entries_per_clip // item.clip.n_views
                self.rows[path].start_row(self._row, item.times.repeat(n_crops, 0), item.spans.repeat(n_crops, 0))
            self.assembler.begin(item)
        elif isinstance(item, FrameStretch):
            self.assembler.feed(item)
        elif isinstance(item, AudioSpan):
            n_views = self._specs[item.store_path].n_sound_views
            self.rows[item.store_path].start_row(
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
            self.rows[item.store_path].end_audio(self._row, item.has_audio, item.loudness_dbfs)
        else:
            assert isinstance(item, RowFailure)
            for path in item.store_paths:
                self.rows[path].fail_for(self._row, item.error)

    def _encode(self, path: str, entry: int, clip: Tensor) -> None:
        self.encoders[path].add(self._row, entry, clip)


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


class OutputWriter:
    """A thread that writes chunks in the order in which they come, so that writing overlaps computing.

    At most N_CHUNKS_AHEAD wait, then `write` does. An error of the disk is raised by one of the next calls. Use as a
    context manager.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="output-writer")
        self._under_way: deque[Future[None]] = deque()

    def write(self, store: FeatureStore, name: str, row: int, clip: int, values: np.ndarray) -> None:
        """Hand a chunk over, which the caller no longer changes."""
        while len(self._under_way) >= N_CHUNKS_AHEAD:
            self._under_way.popleft().result()
        self._under_way.append(self._pool.submit(store.write_outputs, name, row, values, clip))

    def wait(self) -> None:
        """Wait until everything handed over is written."""
        while self._under_way:
            self._under_way.popleft().result()

    def __enter__(self) -> OutputWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def fail_shard(store: FeatureStore, work: ShardWork, reason: str) -> ShardIndex:
    """Make the index of a shard whose workers die: the rows that aren't kept have failed, and a retry may help."""
    index, is_kept = _begin_index(store, work)
    present = np.asarray([segment is not None for segment in work.segments]) & ~is_kept
    index.digest[present] = work.digests[store.path][present]
    index.state[present] = FAILED
    failures = tuple(
        Failure(segment.segment_id, segment.video_id, "WorkerDied", reason, True)
        for segment, failed in zip(work.segments, present.tolist(), strict=True)
        if segment is not None and failed
    )
    _fill_kept(store, work, is_kept, index)
    return replace(index, failures=failures)


def _begin_index(store: FeatureStore, work: ShardWork) -> tuple[ShardIndex, np.ndarray]:
    """Make an index whose rows are pending, and say which rows the store keeps, bool [n]."""
    shard, n_clips = work.task.shard, store.layout.n_clips
    n, has_audio = shard.n_rows, store.spec.audio is not None
    is_kept = np.zeros(n, dtype=bool)
    is_kept[np.asarray(work.task.kept_rows.get(store.path, ()), np.int64) - shard.start_row] = True
    index = ShardIndex(
        times=np.full((n, n_clips, 2), np.nan),
        frames=np.full((n, n_clips, 2), -1, dtype=np.int64),
        n_valid=np.zeros(n, dtype=np.int32),
        digest=np.zeros((n, N_DIGEST_BYTES), dtype=np.uint8),
        state=np.full(n, PENDING, dtype=np.uint8),
        has_audio=np.zeros(n, dtype=np.uint8) if has_audio else None,
        loudness_dbfs=np.full(n, -np.inf, dtype=np.float32) if has_audio else None,
    )
    return index, is_kept


def _fill_kept(store: FeatureStore, work: ShardWork, is_kept: np.ndarray, index: ShardIndex) -> None:
    """Put what the store says of the kept rows into a shard's index, in place."""
    if not is_kept.any():
        return
    for name in ROW_ARRAYS:
        values = getattr(index, name)
        if values is not None:
            values[is_kept] = store.read_array(name, work.task.shard.start_row, work.task.shard.stop_row)[is_kept]
    # A store whose clip axis has grown holds 0 where its older rows have no clip.
    is_absent = is_kept[:, None] & (np.arange(index.times.shape[1]) >= index.n_valid[:, None])
    index.times[is_absent], index.frames[is_absent] = np.nan, -1


@dataclass(frozen=True, slots=True)
class _Block:
    """The rows and entries of one chunk of one output, within the shard and the array."""

    name: str
    row: int
    stop_row: int
    clip: int
    stop_clip: int


class ShardRows:
    """The unfinished chunks of a store's shard and the index of its rows.

    A chunk is written as soon as nothing in it is awaited any more, so that a long row takes no more memory than a few
    chunks. Rows that the task keeps are carried over by the chunk: one that they share with rows that are computed is
    filled when it is begun, and one that holds no other rows is never written. Entry means a place on the second axis:
    a clip, or a view or crop of one.
    """

    def __init__(self, store: FeatureStore, work: ShardWork, writer: OutputWriter) -> None:
        self._store = store
        self._work = work
        self._shard = work.task.shard
        self._writer = writer
        self._index, self._is_kept = _begin_index(store, work)
        if self._is_kept.any():
            n_valid = store.read_array("n_valid", self._shard.start_row, self._shard.stop_row)
            self._index.n_valid[self._is_kept] = n_valid[self._is_kept]
        self._is_awaited = np.tile(~self._is_kept[:, None], store.layout.n_clips)
        self._failures: dict[int, Failure] = {}
        self._chunks: dict[_Block, np.ndarray] = {}
        self._written: set[_Block] = set()
        self._chunk_shapes = {output.name: store.get_output_chunks(output.name) for output in store.spec.outputs}
        self._clip_shapes = {output.name: output.shape for output in store.spec.outputs}
        for i, segment in enumerate(work.segments):  # a row without one stays pending and holds zeros
            if segment is None and not self._is_kept[i]:
                self._is_awaited[i] = False
                self._write_complete(self._shard.start_row + i)

    def start_row(self, row: int, times: np.ndarray, frames: np.ndarray) -> None:
        """Note what a row's entries cover, [n, 2] each; entries beyond n don't exist and aren't awaited."""
        i, k = row - self._shard.start_row, len(times)
        self._index.times[i, :k], self._index.frames[i, :k], self._index.n_valid[i] = times, frames, k
        self._is_awaited[i, k:] = False
        self._write_complete(row)

    def end_audio(self, row: int, has_audio: bool, loudness_dbfs: float) -> None:
        """Note how loud a row is; one without audio is complete, with NaN for features."""
        i = row - self._shard.start_row
        if i in self._failures:
            return
        assert self._index.has_audio is not None and self._index.loudness_dbfs is not None, "a store of audio"
        self._index.has_audio[i], self._index.loudness_dbfs[i] = has_audio, loudness_dbfs
        if not has_audio:
            for block in self._blocks_of(row):
                n_here = max(0, min(int(self._index.n_valid[i]), block.stop_clip) - block.clip)
                self._chunk(block)[row - block.row, :n_here] = np.nan
            self._is_awaited[i] = False
            self._write_complete(row)

    def put(self, row: int, entry: int, features: dict[str, np.ndarray]) -> None:
        """Take one entry's outputs, float32; a value that the store's dtype can't hold fails the row."""
        i = row - self._shard.start_row
        if i in self._failures:
            return
        for name, values in features.items():
            block = self._block(name, row, entry)
            place = self._chunk(block)[row - block.row, entry - block.clip]
            with np.errstate(over="ignore"):
                place[...] = values
            if not np.isfinite(place).all():
                largest = float(np.abs(values).max())
                reason = (
                    f"{name} of clip {entry} is not finite in {place.dtype} (largest magnitude {largest:.6g}); "
                    f"extract with --dtype float32, or check the weights"
                )
                self._fail(row, "NonFiniteFeature", reason, retryable=False)
                return
        self._is_awaited[i, entry] = False
        self._write_complete(row, entry)

    def fail_for(self, row: int, error: MediaError) -> None:
        """Make a row failed because of an error; whatever it got before is wiped."""
        self._fail(row, type(error).__name__, " ".join(str(error).split()), retryable=error.retryable)

    def _fail(self, row: int, exception: str, reason: str, *, retryable: bool) -> None:
        i = row - self._shard.start_row
        segment = self._work.segments[i]
        if i in self._failures or self._is_kept[i]:  # one that is kept was read for other stores' sake
            return
        assert segment is not None, "rows without a segment aren't read"
        self._failures[i] = Failure(segment.segment_id, segment.video_id, exception, reason, retryable)
        self._index.times[i], self._index.frames[i], self._index.n_valid[i] = np.nan, -1, 0
        if self._index.has_audio is not None and self._index.loudness_dbfs is not None:
            self._index.has_audio[i], self._index.loudness_dbfs[i] = 0, -np.inf
        self._is_awaited[i] = False
        for block in self._blocks_of(row):
            if block in self._written:  # a chunk that was complete before the row failed
                self._writer.wait()
                rows = self._store.read_outputs(block.name, block.row, block.stop_row, block.clip, block.stop_clip)
                self._chunks[block] = np.array(rows)
                self._written.discard(block)
            if block in self._chunks:
                self._chunks[block][row - block.row] = 0
        self._write_complete(row)

    def finish(self) -> ShardIndex:
        """Return the shard's index; rows without a segment stay pending. Everything is written before it returns."""
        assert not self._chunks, "a chunk is incomplete at the shard's end"
        self._writer.wait()
        state, digests = self._index.state, self._work.digests[self._store.path]
        state[self._index.n_valid > 0] = DONE
        state[sorted(self._failures)] = FAILED
        self._index.digest[state != PENDING] = digests[state != PENDING]
        _fill_kept(self._store, self._work, self._is_kept, self._index)
        return replace(self._index, failures=tuple(self._failures.values()))

    def _block(self, name: str, row: int, entry: int) -> _Block:
        n_rows, n_clips = self._chunk_shapes[name]
        first_row, first_clip = row - row % n_rows, entry - entry % n_clips
        stop_row = min(first_row + n_rows, self._shard.stop_row)
        return _Block(name, first_row, stop_row, first_clip, min(first_clip + n_clips, self._is_awaited.shape[1]))

    def _blocks_of(self, row: int) -> Iterator[_Block]:
        for name, (_, n_clips) in self._chunk_shapes.items():
            for clip in range(0, self._is_awaited.shape[1], n_clips):
                yield self._block(name, row, clip)

    def _chunk(self, block: _Block) -> np.ndarray:
        """Return a chunk's values [row, clip, ...], begun with zeros and the features of rows that are kept."""
        if block not in self._chunks:
            shape = (block.stop_row - block.row, block.stop_clip - block.clip, *self._clip_shapes[block.name])
            values = self._chunks[block] = np.zeros(shape, dtype=self._store.spec.dtype)
            rows = slice(block.row - self._shard.start_row, block.stop_row - self._shard.start_row)
            here = self._is_kept[rows] & (self._index.n_valid[rows] > block.clip)
            if self._is_kept.any():
                self._writer.wait()  # HDF5 opens a file for reading only where it isn't open for writing
            if here.any():
                stored = self._store.read_outputs(block.name, block.row, block.stop_row, block.clip, block.stop_clip)
                values[here] = stored[here]
        return self._chunks[block]

    def _write_complete(self, row: int, entry: int | None = None) -> None:
        """Write the chunks of a row (those of one entry) in which nothing is awaited any more."""
        names = self._chunk_shapes
        for block in self._blocks_of(row) if entry is None else [self._block(name, row, entry) for name in names]:
            rows = slice(block.row - self._shard.start_row, block.stop_row - self._shard.start_row)
            if self._is_awaited[rows, block.clip : block.stop_clip].any() or block in self._written:
                continue
            if block.clip and not (self._index.n_valid[rows] > block.clip).any():
                self._chunks.pop(block, None)
                self._store.clear_outputs(block.name, block.row, block.stop_row, block.clip, block.stop_clip)
            else:
                self._writer.write(self._store, block.name, block.row, block.clip, self._chunk(block))
                del self._chunks[block]
            self._written.add(block)
