"""Runs extraction and both stages on the simulated GPU, as `--device cuda`, and compares with `--device cpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_shift
from simulated_cuda import RUNNER, simulate_gpu

from echoshift.pipeline.store.open import open_store

SMALL = (
    "frame.short_side=36",
    "frame.crop=32",
    "frame.crops=random-resized",
    "frame.flip=0.5",
    "slowfast_demo.clip.n_frames=4",
    "slowfast_demo.clip.n_views=2",
    "audio.duration_s=1.0",
)


def list_settings(settings: tuple[str, ...]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture
def tiny(tmp_path: Path) -> Any:
    made = tiny_shift.TinyShift(tmp_path, tmp_path / "runs")
    made.make()
    return made


def extract(tiny: Any, device: str, *arguments: object) -> dict[str, Any]:
    cache = tiny.root / f"cache-{device}"
    places = ["--media", tiny.media, "--cache", cache, "--manifests", tiny.root, "--device", device]
    code, _, err = tiny_shift.run("extract", "tiny", *places, *list_settings(SMALL), *arguments)
    assert code == 0, err
    return {path.name.split("-")[0]: open_store(path) for path in (cache / "tiny").glob("*.zarr")}


def test_extraction_comes_to_the_cpus_features(tiny: Any) -> None:
    chosen = tiny.make()[::4]
    tiny.write_manifest(chosen)
    of_cpu = extract(tiny, "cpu")
    n_before = RUNNER.n_run
    with simulate_gpu():
        of_gpu = extract(tiny, "cuda", "--batch", 4)
    assert RUNNER.n_run > n_before + 300, "little of it was on the GPU"
    assert set(of_gpu) == {"slowfast_demo", "resnet_demo"}
    for encoder, store in of_gpu.items():
        ids = list(store.segment_ids)
        assert len(ids) == len(chosen) == 6 and ids == list(of_cpu[encoder].segment_ids)
        for output in store.spec.outputs:
            found, expected = store.read(ids, output.name), of_cpu[encoder].read(ids, output.name)
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)  # both are float16


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_extraction_in_half_precision_is_near_the_cpus_float32(tiny: Any, precision: str) -> None:
    of_cpu = extract(tiny, "cpu")
    with simulate_gpu():
        of_gpu = extract(tiny, "cuda", "--precision", precision)
    for encoder, store in of_gpu.items():
        ids = list(store.segment_ids)
        found = store.read(ids, "pooled").astype(np.float64).reshape(len(ids), -1)
        expected = of_cpu[encoder].read(ids, "pooled").astype(np.float64).reshape(len(ids), -1)
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        assert ((found * expected).sum(axis=1) / norms).min() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [(), ("visual.mode=trunk", "training.trainable_from=split"), ("training.precision=bf16",)],
    ids=("frames", "trunk", "bf16"),
)
def test_both_stages_run_there(tiny: Any, settings: tuple[str, ...]) -> None:
    n_before = RUNNER.n_run
    with simulate_gpu():
        for command in (
            tiny.list_arguments("stage1", "tiny", "--shift", "s-t", settings=settings),
            tiny.list_stage2(settings=settings),
        ):
            code, out, err = tiny_shift.run(*["cuda" if word == "cpu" else word for word in command])
            assert code == 0, err
    assert "top-1" in out.lower()
    assert RUNNER.n_run > n_before + 10_000, "little of it was on the GPU"
