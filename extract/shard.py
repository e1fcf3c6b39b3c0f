"""Computes one shard: reads its media in a thread of its own, encodes on the device, writes features chunk by chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from extract.extraction_plan import ExtractionPlan
from extract.inference import ShardEncoder, resolve_device
from extract.pictures import prepare_clips
from extract.shard_inputs import (
    FrameGroup,
    RowFacts,
    RowFailure,
    ShardInput,
    SoundWindow,
    read_shard_inputs,
)
from extract.shard_rows import ShardRows
from extract.sound.spectrograms import log_spectrogram
from pipeline.execution import ShardReport, ShardTask
from pipeline.specs import FrameSpec
from pipeline.store.interface import FeatureStore
from pipeline.store.opening import open_store

N_INPUTS_AHEAD = 2


def process_shard(
    plan: ExtractionPlan,
    task: ShardTask,
    stores: Mapping[str, FeatureStore] | None = None,
    notify: Callable[[int], None] = lambda n_rows: None,
) -> ShardReport:
    """Computes a task's rows, writes their features to the stores, and returns the index that makes them count.

    Depends on the plan and the media alone, and may be run again at any time with the same result. `notify` is called
    with the number of rows read since the last call.
    """
    if stores is None:
        stores = {path: open_store(path) for path in task.store_paths}
    device = resolve_device(plan.device)
    rows = {path: ShardRows(stores[path], task.shard, plan.targets[path].digests) for path in task.store_paths}
    encoders = {
        path: ShardEncoder(plan.targets[path], rows[path], device, plan.n_clips_per_batch) for path in task.store_paths
    }
    settled = dict.fromkeys(task.store_paths, task.shard.start_row)
    for item in _read_ahead(read_shard_inputs(plan, task)):
        if isinstance(item, RowFacts):
            for path in item.store_paths:
                rows[path].start_row(item)
        elif isinstance(item, RowFailure):
            for path in item.store_paths:
                rows[path].fail(item.row, item.failure)
        elif isinstance(item, FrameGroup):
            _encode_pictures(plan, item, encoders, device)
        elif isinstance(item, SoundWindow):
            for path in item.store_paths:
                _encode_sound(plan, path, item, encoders, device)
        else:
            notify(1)
            for path in task.store_paths:
                settled[path] = _settle(plan, rows[path], settled[path], item.row + 1)
    for path in task.store_paths:
        encoders[path].run()
        _settle(plan, rows[path], settled[path], task.shard.stop_row)
    return ShardReport(task, {path: rows[path].finish() for path in task.store_paths})


def _settle(plan: ExtractionPlan, rows: ShardRows, first: int, stop: int) -> int:
    """Settles the rows from `first` on that are complete, and returns the first that is not."""
    row = first
    while row < stop and (plan.segments[row] is None or rows.is_complete(row)):
        rows.write_complete_chunks(row)
        row += 1
    return row


def _encode_pictures(
    plan: ExtractionPlan, group: FrameGroup, encoders: Mapping[str, ShardEncoder], device: torch.device
) -> None:
    """Sends each picture to the device once, prepares it once a FrameSpec, and hands out the clips."""
    frames = torch.from_numpy(group.frames).to(device)
    by_frame_spec: dict[FrameSpec, list[tuple[str, int, int, torch.Tensor]]] = {}
    for request in group.requests:
        picks = torch.from_numpy(request.picks).to(device)
        for path in request.store_paths:
            frame_spec = plan.targets[path].spec.frame
            assert frame_spec is not None, "pictures go to stores of pictures"
            by_frame_spec.setdefault(frame_spec, []).append((path, request.row, request.clip, picks))
    for frame_spec, clips in by_frame_spec.items():
        prepared = prepare_clips(frames[None], frame_spec)[0]
        for path, row, clip, picks in clips:
            encoders[path].add(row, clip, prepared[:, picks])


def _encode_sound(
    plan: ExtractionPlan, path: str, item: SoundWindow, encoders: Mapping[str, ShardEncoder], device: torch.device
) -> None:
    spec = plan.targets[path].spec.audio
    assert spec is not None, "sound goes to stores of sound"
    spectrogram = log_spectrogram(torch.from_numpy(item.samples)[None].to(device), spec)[0]
    encoders[path].add(item.row, item.clip, spectrogram)


def _read_ahead(inputs: Iterator[ShardInput]) -> Iterator[ShardInput]:
    """Runs an iterator in a thread, N_INPUTS_AHEAD items ahead; its errors are raised here, in their place."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        ahead = deque(pool.submit(next, inputs, None) for _ in range(N_INPUTS_AHEAD))
        while (item := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, inputs, None))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
