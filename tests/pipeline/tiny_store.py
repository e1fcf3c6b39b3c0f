"""Tiny stores whose values depend on row and seed alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from echoshift.pipeline.execution import ShardReport, ShardTask, commit_report
from echoshift.pipeline.specs import FeatureSpec, FrameSpec, OutputSpec
from echoshift.pipeline.store.interface import Failure, FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import DONE, FAILED, Shard, plan_shards
from echoshift.pipeline.store.location import Place
from echoshift.pipeline.store.lock import StoreLock
from echoshift.pipeline.store.open import create_store

N_CLIPS = 3


def make_spec(shapes: Mapping[str, tuple[int, ...]], dtype: str = "float32", sampling: str = "uniform") -> FeatureSpec:
    """Make a spec of these outputs."""
    windows = {"sampling": "windows", "step": 4} if sampling == "windows" else {"n_clips": N_CLIPS}
    return FeatureSpec.model_validate(
        {
            "encoder": "toy",
            "weights": "0" * 64,
            "clip": {"n_frames": 4, "stride": 2, "rate_hz": 30, **windows},
            "frame": FrameSpec(short_side=8, crop=8, mean=(0, 0, 0), std=(1, 1, 1)),
            "outputs": tuple(OutputSpec(name=name, shape=shape) for name, shape in shapes.items()),
            "dtype": dtype,
        }
    )


def make_store(
    path: Place, spec: FeatureSpec, n_rows: int = 20, n_clips: int = N_CLIPS, n_rows_per_shard: int = 8
) -> FeatureStore:
    """Create an empty store of the segments s000, s001, …"""
    ids = [f"s{i:03d}" for i in range(n_rows)]
    return create_store(
        path, "toy", spec, ids,
        n_clips=n_clips, manifest_sha256="m", weights_source="test", n_rows_per_shard=n_rows_per_shard,
    )  # fmt: skip


def make_values(
    rows: np.ndarray, *shape: int, n_clips: int = N_CLIPS, dtype: str = "float32", seed: int = 0
) -> np.ndarray:
    """Make values [row, clip, …] that depend on the row's number and the seed alone."""
    values = [np.random.default_rng([seed, row]).standard_normal((n_clips, *shape)) for row in rows.tolist()]
    return np.stack(values).astype(dtype)


def make_digests(rows: np.ndarray) -> np.ndarray:
    """Make a digest a row."""
    return np.stack([np.random.default_rng(1000 + r).integers(0, 256, 16, dtype=np.uint8) for r in rows])


def make_index(
    shard: Shard, n_valid: np.ndarray | int = N_CLIPS, n_clips: int = N_CLIPS, failed: frozenset[int] = frozenset()
) -> ShardIndex:
    """Make an index whose rows in `failed` (row numbers of the store) failed; clip times are row to row + 1."""
    rows = np.arange(shard.start_row, shard.stop_row)
    is_failed = np.isin(rows, sorted(failed))
    counts = np.where(is_failed, 0, n_valid).astype(np.int32)
    exists = (np.arange(n_clips)[None] < counts[:, None])[..., None]
    return ShardIndex(
        times=np.where(exists, rows[:, None, None] + np.asarray([0.0, 1.0]), np.nan),
        frames=np.where(exists, rows[:, None, None] + np.asarray([0, 0]), -1),
        n_valid=counts,
        digest=make_digests(rows),
        state=np.where(is_failed, FAILED, DONE).astype(np.uint8),
        failures=tuple(Failure(f"s{r:03d}", "v", "DecodeError", "bad", False) for r in rows[is_failed].tolist()),
    )


def fill(
    store: FeatureStore,
    failed: frozenset[int] = frozenset(),
    shards: tuple[int, ...] | None = None,
    seed: int = 0,
    hold: StoreLock | None = None,
) -> None:
    """Write and commit shards (None: all), as a run does."""
    for shard in plan_shards(store.layout):
        if shards is not None and shard.index not in shards:
            continue
        store.begin_shard(shard)
        n_clips, rows = store.layout.n_clips, np.arange(shard.start_row, shard.stop_row)
        for output in store.spec.outputs:
            values = make_values(rows, *output.shape, n_clips=n_clips, dtype=store.spec.dtype, seed=seed)
            store.write_outputs(output.name, shard.start_row, values)
        report = ShardReport(ShardTask(shard, (store.path,)), {store.path: make_index(shard, n_clips, n_clips, failed)})
        commit_report({store.path: store}, report, None if hold is None else {store.path: hold})
