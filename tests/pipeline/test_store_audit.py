"""Checks the audit's numbers against plain NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from echoshift.cli import stores as store_commands
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FeatureSpec, OutputSpec
from echoshift.pipeline.store import audit as auditing
from echoshift.pipeline.store.audit import NORM_QUANTILES, audit_output, find_audit_faults, measure_fp16_error
from echoshift.pipeline.store.interface import FeatureStore, ShardIndex
from echoshift.pipeline.store.layout import plan_shards
from echoshift.pipeline.store.open import create_store

N_ROWS, N_CLIPS, N_DIMS = 100, 3, 12
SPEC = FeatureSpec(
    encoder="toy",
    weights="0" * 64,
    clip=ClipSpec(n_frames=4, n_clips=N_CLIPS),
    audio=AudioSpec(
        recipe="zhang2022", span="clip", rate_hz=100, duration_s=1, n_window=4, n_hop=2, n_fft=4, log_floor=1e-3,
        standardise=True,
    ),
    outputs=(OutputSpec(name="pooled", shape=(N_DIMS // 2, 2)),),
    dtype="float32",
)  # fmt: skip


def make_store(
    path: Path, values: np.ndarray, state: np.ndarray, sound: np.ndarray, n_valid: np.ndarray
) -> FeatureStore:
    store = create_store(
        path, "toy", SPEC.model_copy(update={"dtype": values.dtype.name}), [f"s{i:03d}" for i in range(len(values))],
        n_clips=N_CLIPS, manifest_sha256="m", weights_source="t", n_rows_per_shard=8,
    )  # fmt: skip
    for shard in plan_shards(store.layout):
        rows = slice(shard.start_row, shard.stop_row)
        store.write_outputs("pooled", shard.start_row, values[rows])
        index = ShardIndex(
            times=np.tile([0.0, 1.0], (shard.n_rows, N_CLIPS, 1)),
            frames=np.zeros((shard.n_rows, N_CLIPS, 2), np.int64),
            n_valid=n_valid[rows],
            digest=np.zeros((shard.n_rows, 16), np.uint8),
            state=state[rows],
            has_audio=sound[rows],
            loudness_dbfs=np.zeros(shard.n_rows, np.float32),
        )
        store.commit_shard(shard, index)
    return store


def make_parts(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    values = (generator.standard_normal((N_ROWS, N_CLIPS, N_DIMS // 2, 2)) * 3 + 40).astype(dtype)
    values[:, :, 1, 0] = 2.5
    state = np.ones(N_ROWS, np.uint8)
    state[40:56] = 0
    state[60] = 2
    sound = np.ones(N_ROWS, np.uint8)
    sound[[3, 70]] = 0
    values[[3, 70]] = np.nan
    return values, state, sound, (np.arange(N_ROWS) % N_CLIPS + 1).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numbers_are_those_of_plain_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(auditing, "N_AUDIT_BLOCK_BYTES", 2000)  # 13 blocks and more, merged in two steps
    values, state, sound, n_valid = make_parts(dtype)
    store = make_store(tmp_path / "x.zarr", values, state, sound, n_valid)
    told: list[int] = []
    audit = audit_output(store, "pooled", told.append)
    assert sum(told) == N_ROWS
    chosen = ((state == 1) & (sound == 1))[:, None] & (np.arange(N_CLIPS)[None] < n_valid[:, None])
    vectors = values[chosen].reshape(-1, N_DIMS).astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1)
    assert (audit.n_rows, audit.n_silent, audit.n_vectors) == (81, 2, len(vectors))
    assert (audit.n_nonfinite, audit.n_dims, audit.share_dead) == (0, N_DIMS, 1 / N_DIMS)
    np.testing.assert_allclose([audit.mean, audit.std], [vectors.mean(), vectors.std()], rtol=1e-12)
    assert (audit.min, audit.max) == (vectors.min(), vectors.max())
    np.testing.assert_allclose(audit.norm_quantiles, np.quantile(norms, NORM_QUANTILES), rtol=1e-12)
    counts, edges = np.histogram(norms, 20)
    assert list(audit.norm_counts) == counts.tolist()
    np.testing.assert_allclose(audit.norm_edges, edges, rtol=1e-12)
    assert find_audit_faults(audit) == []
    assert audit.fp16 == (measure_fp16_error(values[chosen]) if dtype == "float32" else None)


def test_the_cost_of_fp16_is_measured() -> None:
    normal = np.random.default_rng(0).uniform(1, 2, 10_000).astype(np.float32)
    error = measure_fp16_error(normal)
    relative = np.abs(normal.astype(np.float16).astype(np.float64) - normal) / normal
    assert error.max_relative == pytest.approx(relative.max(), rel=1e-12)
    assert error.rms_relative == pytest.approx(np.sqrt((relative**2).mean()), rel=1e-12)
    assert error.max_relative <= 2.0**-11
    mixed = np.asarray([0.0, 1.0, 70000.0, -1e6, 1e-5, 1e-9, np.nan, 0.5], np.float32)
    error = measure_fp16_error(mixed)
    assert (error.n_values, error.max_relative) == (7, 1.0)
    assert error.share_overflow == pytest.approx(2 / 7)
    assert error.share_subnormal == pytest.approx(2 / 7)
    assert measure_fp16_error(np.zeros(0, np.float32)).n_values == 0


def test_faults_end_with_1_and_a_line_each(tmp_path: Path) -> None:
    values, state, sound, n_valid = make_parts()
    make_store(tmp_path / "good.zarr", values, state, sound, n_valid)
    run = CliRunner().invoke(store_commands.app, ["audit", str(tmp_path / "good.zarr")])
    assert run.exit_code == 0
    assert "pooled: 163 clips of 81 done rows, 2 without audio left out" in run.output
    assert run.output.count("#") >= 20
    values[80, 0, 0, 0] = np.inf
    make_store(tmp_path / "bad.zarr", values, state, sound, n_valid)
    run = CliRunner().invoke(store_commands.app, ["audit", str(tmp_path / "bad.zarr"), "--json"])
    assert run.exit_code == 1
    report = json.loads(run.stdout)
    assert report["faults"] == ["outputs/pooled: 1 clips hold NaN or infinity, the first of segment s080"]
    assert report["outputs"][0]["n_vectors"] == 162
    make_store(tmp_path / "dead.zarr", np.ones_like(values), state, np.ones_like(sound), n_valid)
    run = CliRunner().invoke(store_commands.app, ["audit", str(tmp_path / "dead.zarr"), "--output", "pooled"])
    assert run.exit_code == 1
    assert "outputs/pooled: all 12 dimensions are the same for every clip" in run.output
