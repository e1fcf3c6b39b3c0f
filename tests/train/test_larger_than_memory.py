"""A store of five times the memory that is allowed: every row once, few reads, the same features."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from echoshift.pipeline.errors import RunError, StoreError
from echoshift.pipeline.specs import ClipSpec, FeatureSpec, FrameSpec, OutputSpec
from echoshift.pipeline.store.interface import FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import DONE, plan_shards
from echoshift.pipeline.store.opening import create_store
from echoshift.train.cached.feature_bank import FeatureBank, make_bank
from echoshift.train.cached.feature_rows import FeatureRows, read_visual
from echoshift.train.cached.larger_than_memory import StoredBank, StoredRows, count_row_bytes, open_rows
from echoshift.train.cached.training import train_jobs
from echoshift.train.watching import SilentWatcher

CPU = torch.device("cpu")
N_ROWS, N_PER_SHARD, N_CLIPS, N_VIEWS, N_VISUAL, N_AUDIO = 300, 5, 2, 2, 5, 4
N_ENTRIES = N_CLIPS * N_VIEWS
N_ROW_BYTES = N_ENTRIES * N_VISUAL * 2
MAX_BYTES = N_ROWS * N_ROW_BYTES // 5
IDS = tuple(f"s{i:03d}" for i in range(N_ROWS))
SHORT = np.arange(N_ROWS) % 7 == 0  # segments of a single clip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    spec = FeatureSpec(
        encoder="slowfast_demo",
        weights="0" * 64,
        revision=1,
        clip=ClipSpec(n_frames=4, stride=1, rate_hz=10, n_clips=N_CLIPS, n_views=N_VIEWS),
        frame=FrameSpec(input="rgb", short_side=32, crop=32, mean=(0, 0, 0), std=(1, 1, 1), flip=0.5),
        outputs=(OutputSpec(name="pooled", shape=(N_VISUAL,)),),
        dtype="float16",
    )
    path = tmp_path_factory.mktemp("large") / "a.zarr"
    made = create_store(
        path,
        "toy",
        spec,
        IDS,
        n_clips=N_ENTRIES,
        manifest_sha256="0",
        weights_source="none",
        n_rows_per_shard=N_PER_SHARD,
    )
    values = np.random.default_rng(0).standard_normal((N_ROWS, N_ENTRIES, N_VISUAL)).astype(np.float16)
    values[SHORT, N_VIEWS:] = 0
    for shard in plan_shards(made.layout):
        made.begin_shard(shard)
        made.write_outputs("pooled", shard.start_row, values[shard.start_row : shard.stop_row])
        n = shard.n_rows
        index = ShardIndex(
            times=np.zeros((n, N_ENTRIES, 2)),
            frames=np.zeros((n, N_ENTRIES, 2), dtype=np.int64),
            n_valid=np.where(SHORT[shard.start_row : shard.stop_row], N_VIEWS, N_ENTRIES).astype(np.int32),
            digest=np.zeros((n, 16), dtype=np.uint8),
            state=np.full(n, DONE, dtype=np.uint8),
        )
        made.commit_shard(shard, index)
    return made


def make_sound(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.standard_normal((n, N_AUDIO)).astype(np.float32)), torch.from_numpy(rng.random(n) < 0.9)


def open_some(store: FeatureStore, ids: tuple[str, ...]) -> StoredRows:
    return open_rows(store, ids, *make_sound(len(ids)), MAX_BYTES)


def test_batches_are_those_of_features_in_memory(store: FeatureStore) -> None:
    ids = tuple(reversed(IDS[::3]))
    stored = open_some(store, ids)
    held = FeatureRows(ids, read_visual(store, ids), *make_sound(len(ids)))
    assert (stored.shapes, stored.n_views, stored.n_clips) == (held.shapes, held.n_views, held.n_clips)
    rng = np.random.default_rng(2)
    rows, clips = torch.from_numpy(rng.integers(0, len(ids), 40)), torch.from_numpy(rng.integers(0, N_CLIPS, 40))
    views = torch.from_numpy(rng.integers(0, N_VIEWS, 40))
    for of_clips in (None, clips):
        one = FeatureBank([held], CPU).gather(rows, views, of_clips)
        other = StoredBank(stored, CPU).gather(rows, views, of_clips)
        assert torch.equal(one.visual["pooled"], other.visual["pooled"])
        assert torch.equal(one.audio, other.audio) and torch.equal(one.has_audio, other.has_audio)


def test_a_batch_of_more_shards_than_are_held_is_whole_and_an_empty_one_has_its_shapes(store: FeatureStore) -> None:
    stored = open_some(store, IDS)
    bank = StoredBank(stored, CPU)
    rows = torch.from_numpy(np.random.default_rng(3).permutation(N_ROWS)).view(2, N_ROWS // 2)
    assert bank.held.n_slots < store.layout.n_shards
    views = torch.from_numpy(np.random.default_rng(4).integers(0, N_VIEWS, rows.shape))
    values = store.read_all("pooled").reshape(N_ROWS, N_CLIPS, N_VIEWS, N_VISUAL).astype(np.float32)
    values[SHORT, 1] = values[SHORT, 0]
    expected = values[rows.numpy(), :, views.numpy()]
    assert np.array_equal(bank.gather(rows, views).visual["pooled"].numpy(), expected)
    assert bank.held.n_reads == store.layout.n_shards
    nothing = bank.gather(rows[0, :0])
    assert nothing.visual["pooled"].shape == (0, N_CLIPS, N_VISUAL) and nothing.audio.shape == (0, N_AUDIO)


def test_an_epoch_takes_every_row_once_and_holds_no_more_than_is_allowed(store: FeatureStore) -> None:
    stored = open_some(store, IDS)
    assert N_ROWS * count_row_bytes(store) == 5 * MAX_BYTES
    held = stored.shards.open()
    bank = StoredBank(stored, CPU)
    # Three shards' worth is left for reading one.
    assert held.n_bytes == MAX_BYTES - 3 * N_PER_SHARD * N_ROW_BYTES
    rows = np.arange(0, N_ROWS, 2)
    for epoch in range(2):
        n_before = held.n_reads
        order = stored.shuffle(rows, 7, epoch, 0)
        assert sorted(order.tolist()) == list(range(len(rows)))
        for start in range(0, len(order), 8):
            bank.gather(torch.from_numpy(rows[order[start : start + 8]]))
        assert held.n_reads - n_before <= store.layout.n_shards, "a shard is read once an epoch"
    assert not np.array_equal(stored.shuffle(rows, 7, 0, 0), stored.shuffle(rows, 7, 1, 0))
    assert np.array_equal(stored.shuffle(rows, 7, 1, 0), stored.shuffle(rows, 7, 1, 0))
    # Rows of a shard don't come in the store's order, nor shard by shard.
    shards = rows[stored.shuffle(rows, 7, 0, 0)] // N_PER_SHARD
    assert (np.diff(shards) != 0).sum() > 1.5 * store.layout.n_shards


def test_who_trains_and_who_predicts_hold_the_same_shards_and_let_go_of_them(store: FeatureStore) -> None:
    stored = open_some(store, IDS)
    one, other = StoredBank(stored, CPU), StoredBank(stored.without_sound(), CPU)
    one.gather(torch.arange(N_PER_SHARD))
    other.gather(torch.arange(N_PER_SHARD))
    assert one.held is other.held and one.held.n_reads == 1
    del one, other
    gc.collect()
    assert stored.shards.open().n_reads == 0, "what the banks held is gone with them"


def test_a_run_trains_through_it_in_few_reads(store: FeatureStore, toy: ModuleType) -> None:
    stored = open_some(store, IDS)
    job = toy.make_job(0, 60)
    target = np.arange(200, N_ROWS)
    data = replace(
        job.data,
        train=stored,
        source=np.arange(200),
        source_labels=np.arange(200) % 3,
        source_domains=np.zeros(200, dtype=np.int64),
        target=target,
        pseudo_labels=np.full(len(target), -1),
    )
    held = stored.shards.open()
    [run] = train_jobs(
        [replace(job, data=data, predict={"target_test": (stored, target, "target")})], CPU, SilentWatcher()
    )
    assert np.isfinite(run.losses).all() and run.predictions["target_test"].shape == (1, 100, 3)
    # Two epochs of the source's 40 shards, two rounds of the target's 20 and a prediction; in any order it was 397.
    assert held.n_reads <= 40 * 2 + 20 * 2 + 20


def test_what_is_not_there_or_does_not_go_is_said(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match="segment nothing is not in"):
        open_some(store, ("nothing",))
    with pytest.raises(RunError, match=r"larger than data.max_memory_mb can't be trained on in stacks"):
        make_bank([open_some(store, IDS), open_some(store, IDS)], CPU)
    with pytest.raises(RunError, match=r"500 bytes are too few .* shards of 200 bytes .* data.max_memory_mb to 1 or"):
        open_rows(store, IDS, *make_sound(N_ROWS), 500)
