"""Cached features: views and clips in their places, batches as by plain indexing, in memory and from the store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_method as toy

from echoshift.extract.feature_specs import StoreOptions, make_feature_spec
from echoshift.extract.weights.load import resolve_weights
from echoshift.pipeline.errors import RunError, StoreError
from echoshift.pipeline.specs import ClipSpec, FeatureSpec, FrameSpec, OutputSpec
from echoshift.pipeline.store.interface import FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import DONE, plan_shards
from echoshift.pipeline.store.open import create_store
from echoshift.train.features import FeatureRows, Sound, read_rows, read_sound, read_visual
from echoshift.train.loop import predict_rows, train_run
from echoshift.train.watching import SilentWatcher

IDS = tuple(f"s{i}" for i in range(30))
CPU = torch.device("cpu")


def write_store(
    path: Path,
    values: np.ndarray,
    n_valid: list[int],
    *,
    n_views: int,
    n_crops: int,
    is_sound: bool = False,
    n_sound_views: int = 1,
) -> FeatureStore:
    """Write a store whose one output has these values [n, entries, C]."""
    spec = FeatureSpec(
        encoder="slowfast_demo",
        weights="0" * 64,
        revision=1,
        clip=ClipSpec(n_frames=4, stride=1, rate_hz=10, n_clips=values.shape[1] // n_views // n_crops, n_views=n_views),
        frame=FrameSpec(
            input="rgb",
            short_side=32,
            crop=32,
            mean=(0, 0, 0),
            std=(1, 1, 1),
            crops="three" if n_crops > 1 else "centre",
        ),
        outputs=(OutputSpec(name="pooled", shape=(values.shape[2],)),),
        dtype="float16",
    )
    if is_sound:
        settings = [f"audio.n_views={n_sound_views}", f"audio.noise={0.05 if n_sound_views > 1 else 0}"]
        weights = resolve_weights("random:0", "resnet_demo")
        heard = make_feature_spec("resnet_demo", weights, StoreOptions(), overrides=settings)
        spec = spec.model_copy(update={"encoder": heard.encoder, "frame": None, "audio": heard.audio})
    n, n_entries = values.shape[:2]
    store = create_store(
        path, "toy", spec, IDS[:n], n_clips=n_entries, manifest_sha256="0", weights_source="none", n_rows_per_shard=n
    )
    [shard] = plan_shards(store.layout)
    store.begin_shard(shard)
    n_rows, n_clips = store.get_output_chunks("pooled")
    for row in range(0, n, n_rows):
        for clip in range(0, n_entries, n_clips):
            part = values[row : row + n_rows, clip : clip + n_clips].astype(np.float16)
            store.write_outputs("pooled", row, part, clip)
    index = ShardIndex(
        times=np.zeros((n, n_entries, 2)),
        frames=np.zeros((n, n_entries, 2), dtype=np.int64),
        n_valid=np.array(n_valid, dtype=np.int32),
        digest=np.zeros((n, 16), dtype=np.uint8),
        state=np.full(n, DONE, dtype=np.uint8),
        has_audio=np.ones(n, dtype=np.uint8) if is_sound else None,
        loudness_dbfs=np.zeros(n, dtype=np.float32) if is_sound else None,
    )
    store.commit_shard(shard, index)
    return store


def test_entries_are_clips_of_views_of_crops(tmp_path):
    n_clips, n_views, n_crops = 2, 1, 3
    # Each value says which clip, view and crop it is of.
    values = np.array(
        [[[100 * c + 10 * v + k] for c in range(n_clips) for v in range(n_views) for k in range(n_crops)]] * 2
    )
    store = write_store(tmp_path / "a.zarr", values, [18, 18], n_views=n_views, n_crops=n_crops)
    visual = read_visual(store, ["s1"])["pooled"]
    assert visual.shape == (1, n_views * n_crops, n_clips, 1) and visual.dtype == torch.float16
    for clip in range(n_clips):
        for view in range(n_views):
            for crop in range(n_crops):
                assert visual[0, view * n_crops + crop, clip, 0] == 100 * clip + 10 * view + crop


def test_a_clip_that_is_not_there_repeats_those_that_are(tmp_path):
    values = np.arange(10.0).reshape(2, 5, 1)
    values[1, 2:] = 0
    store = write_store(tmp_path / "a.zarr", values, [5, 2], n_views=1, n_crops=1)
    visual = read_visual(store, ["s1", "s0"])["pooled"][:, 0, :, 0].tolist()
    assert visual == [[5, 6, 5, 6, 5], [0, 1, 2, 3, 4]]


def test_of_views_of_sound_the_clean_one_is_read(tmp_path):
    values = np.arange(24.0).reshape(2, 6, 2)
    values[1, 4:] = 0
    store = write_store(tmp_path / "a.zarr", values, [6, 4], n_views=1, n_crops=1, is_sound=True, n_sound_views=2)
    sound = read_sound(store, ["s1", "s0"], 3)
    assert sound.clip_audio.tolist() == [[[12, 13], [16, 17], [12, 13]], [[0, 1], [4, 5], [8, 9]]]
    assert sound.audio[1].tolist() == [4, 5]


def test_sound_around_clips_goes_with_its_clip_and_a_segment_s_is_its_mean(tmp_path):
    values = np.arange(12.0).reshape(2, 3, 2)
    values[1, 2:] = 0
    store = write_store(tmp_path / "a.zarr", values, [3, 2], n_views=1, n_crops=1, is_sound=True)
    sound = read_sound(store, ["s1", "s0"], 3)
    assert sound.clip_audio[0].tolist() == [[6, 7], [8, 9], [6, 7]], "a clip that isn't there repeats one that is"
    assert torch.allclose(sound.audio, torch.tensor([[20 / 3, 23 / 3], [2, 3]]))
    assert read_sound(store, ["s1"], 5).clip_audio is None, "the frames have other clips"
    rows = replace(make_rows(2, 0), audio=sound.audio, has_audio=sound.has_audio, clip_audio=sound.clip_audio)
    which, clips = torch.tensor([1, 0, 0]), torch.tensor([2, 0, 1])
    assert rows.gather(which, None, clips).audio.tolist() == [[4, 5], [6, 7], [8, 9]]
    assert torch.equal(rows.gather(which).audio, sound.audio[which])
    assert rows.gather(which, None, clips).visual["pooled"][0, 0].tolist() == rows.visual["pooled"][1, 0, 2].tolist()
    assert rows.without_sound().gather(which, None, clips).audio.abs().sum() == 0


def test_a_segment_that_is_not_there_is_named(tmp_path):
    store = write_store(tmp_path / "a.zarr", np.zeros((2, 1, 1)), [1, 1], n_views=1, n_crops=1)
    with pytest.raises(StoreError, match="segment s5 is not in"):
        read_visual(store, ["s0", "s5"])
    with pytest.raises(RunError, match="no features of segment s5"):
        make_rows(2, 0).find(["s5"])


def make_rows(n: int, seed: int, *, n_views: int = 2, n_clips: int = 3) -> FeatureRows:
    rng = np.random.default_rng(seed)
    return FeatureRows(
        IDS[:n],
        {"pooled": torch.from_numpy(rng.standard_normal((n, n_views, n_clips, 4)).astype(np.float16))},
        torch.from_numpy(rng.standard_normal((n, 2)).astype(np.float32)),
        torch.from_numpy(rng.random(n) < 0.5),
    )


@pytest.mark.parametrize("n_views", [1, 2])
def test_batches_are_those_of_plain_indexing(n_views):
    held = make_rows(6, 0, n_views=n_views)
    rng = np.random.default_rng(2)
    rows = torch.from_numpy(rng.integers(0, 6, 10))
    views = torch.from_numpy(rng.integers(0, n_views, 10))
    clips = torch.from_numpy(rng.integers(0, 3, 10))
    visual = held.visual["pooled"].float()
    batch, single = held.gather(rows, views), held.gather(rows, views, clips)
    assert batch.visual["pooled"].dtype == torch.float32
    assert torch.equal(batch.visual["pooled"], visual[rows, views])
    assert torch.equal(single.visual["pooled"], visual[rows, views, clips][:, None])
    assert torch.equal(batch.audio, held.audio[rows])
    assert torch.equal(batch.has_audio, held.has_audio[rows])


def test_what_does_not_fit_into_memory_trains_and_predicts_as_what_does(tmp_path):
    """30 segments of 2 clips in 3 crops; every seventh has one clip alone."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((30, 6, toy.N_VISUAL))
    n_valid = [3 if row % 7 == 0 else 6 for row in range(30)]
    store = write_store(tmp_path / "a.zarr", values, n_valid, n_views=1, n_crops=3)
    ids = tuple(reversed(store.segment_ids))
    sound = Sound(torch.from_numpy(rng.standard_normal((30, toy.N_AUDIO)).astype(np.float32)), torch.ones(30) > 0)
    n_bytes = 30 * 6 * toy.N_VISUAL * 2
    held, stored = read_rows(store, ids, sound, n_bytes), read_rows(store, ids, sound, n_bytes - 1)
    assert held.stored is None and stored.stored is not None and not stored.visual
    assert (stored.shapes, stored.n_views, stored.n_clips) == (held.shapes, held.n_views, held.n_clips)
    rows, views = torch.tensor([3, 29, 3, 0]), torch.tensor([0, 1, 2, 0])
    for clips in (None, torch.tensor([1, 1, 0, 1])):
        for one, other in zip(held.gather(rows, views, clips), stored.gather(rows, views, clips), strict=True):
            assert torch.equal(*(part["pooled"] if isinstance(part, dict) else part for part in (one, other)))
    runs = []
    for source in (held, stored):
        job = toy.make_job(0, 6, rows=source)
        run = train_run(job, CPU, SilentWatcher())
        method = job.build()
        method.load_state_dict(run.state)
        runs.append((run.losses, predict_rows(method.eval(), source, np.arange(30), "target", CPU)))
    for one, other in zip(*runs, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(StoreError, match="segment nothing is not in"):
        read_rows(store, ["nothing"], sound, 0)
