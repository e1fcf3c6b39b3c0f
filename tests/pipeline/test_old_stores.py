"""Checks that stores written by the code of 2026-12-01, before its rebuilding, are read, verified and extended."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from echoshift.pipeline.store.failures import read_failures
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.open import open_store
from echoshift.pipeline.store.verify import verify_store

STORES = Path(__file__).parent / "data" / "stores-of-0.1.0.zip"
DONE_IDS = [f"v/{i}" for i in range(19)]


@pytest.fixture(params=["old.zarr", "old.h5"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FeatureStore:
    with zipfile.ZipFile(STORES) as archive:
        archive.extractall(tmp_path)
    return open_store(tmp_path / request.param)


def test_an_old_store_reads_as_it_was_written(store: FeatureStore) -> None:
    assert verify_store(store) == []
    assert (store.attributes["dataset"], store.spec.encoder, store.layout.n_rows) == ("toy", "toy", 20)
    assert list(store.segment_ids) == [*DONE_IDS, "v/19"]
    rows = np.arange(19.0)
    expected = (rows[:, None, None] + np.array([[0.0], [0.5]]) + np.zeros(3)).astype(np.float16)
    np.testing.assert_array_equal(store.read(DONE_IDS, "pooled"), expected)
    trunk = store.read_clips(DONE_IDS[::-1], "trunk", np.ones(19, np.int64))
    np.testing.assert_array_equal(trunk, np.broadcast_to((2 * rows[::-1] + 1)[:, None, None, None, None], trunk.shape))
    np.testing.assert_array_equal(
        store.read_array("times")[:, 1], np.stack([np.arange(20) + 0.5, np.arange(20) + 1.0], 1)
    )
    assert store.read_array("state").tolist() == [1] * 19 + [2]
    assert read_failures(store.path)["v/19"].exception == "DecodeError"


def test_an_old_store_is_extended(store: FeatureStore) -> None:
    before = store.read(DONE_IDS, "pooled")
    store.extend(["w/0"], 2)
    grown = open_store(store.path)
    assert grown.read_array("state").tolist() == [1] * 19 + [2, 0]
    np.testing.assert_array_equal(grown.read(DONE_IDS, "pooled"), before)
    assert verify_store(grown) == []
