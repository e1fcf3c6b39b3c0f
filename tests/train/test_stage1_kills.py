"""Checks that a run of Stage 1 that is killed goes on, and ends in the same bytes as one that isn't."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import tiny_shift

from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.open import open_store
from echoshift.train.stage1.training import STATE

SETTINGS = [
    "training.n_epochs=3",
    "training.validate_every=0",
    "visual.test_preset=zhang-stage1-val",
    "training.n_source=2",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    tiny = tiny_shift.TinyShift(root, root / "runs")
    tiny.make()
    code, _, err = tiny.stage1(settings=SETTINGS)
    assert code == 0, err
    return tiny


def read_bytes(tiny: Any) -> dict[str, bytes]:
    store = open_store(next(tiny.find_step("features").glob("*.zarr")))
    names = [f"outputs/{output.name}" for output in store.spec.outputs]
    names += ["times", "frames", "n_valid", "digest", "state", "segment_id"]
    read = {name: store.read_array(name).tobytes() for name in names}
    assert (store.read_array("state") == DONE).all()
    read["checkpoint"] = (tiny.find_step("encoder") / "encoder.safetensors").read_bytes()
    read["table"] = (tiny.find_step("table") / "table.parquet").read_bytes()
    return read


def has(tiny: Any, pattern: str) -> Callable[[], bool]:
    """Return a function that says whether anything below the steps matches."""
    return lambda: any(tiny.steps.glob(pattern))


@pytest.mark.parametrize(
    "pattern",
    [
        f"encoder-*/{STATE}",  # after some epoch
        pytest.param("encoder-*/tensorboard", marks=pytest.mark.slow),  # before the first
        pytest.param("audio_classifier-????????????", marks=pytest.mark.slow),
        pytest.param("features-*/*.zarr", marks=pytest.mark.slow),
        pytest.param("features-*/*-predictions/*.npz", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_ends_in_the_same_bytes(whole, tmp_path, pattern):
    tiny = whole.with_runs(tmp_path)
    tiny_shift.kill_when(tiny.start(settings=SETTINGS), has(tiny, pattern))
    if pattern.startswith("encoder"):
        assert not list(tiny.steps.glob("encoder-*/record.json")), "it was killed before the step's end"
    code, _, err = tiny.stage1(settings=SETTINGS)
    assert code == 0, err
    if pattern.endswith(STATE):
        assert "epoch 1/3" not in err, "it went on, it didn't begin anew"
    assert read_bytes(tiny) == read_bytes(whole)
    assert {path.name for path in tiny.steps.glob("*/")} == {path.name for path in whole.steps.glob("*/")}


@pytest.mark.parametrize("n_kept", [0, 1])
def test_features_go_on_from_the_shards_that_are_done(whole, tmp_path, monkeypatch, n_kept):
    """Stops where a kill may hit: after a shard's predictions are written, before or after the shard is committed."""
    from echoshift.train.stage1 import export

    shutil.copytree(whole.runs, tmp_path / "runs")
    tiny = whole.with_runs(tmp_path / "runs")
    shutil.rmtree(tiny.find_step("features"))
    monkeypatch.setattr(export, "plan_rows_per_shard", lambda *_: 8)
    commits, commit = [], export._commit

    class Killed(BaseException):
        pass

    def stop(*arguments: Any) -> None:
        if len(commits) == n_kept:
            raise Killed
        commits.append(arguments)
        commit(*arguments)

    monkeypatch.setattr(export, "_commit", stop)
    with pytest.raises(Killed):
        tiny.stage1(settings=SETTINGS)
    done: list[Any] = []

    def count(*arguments: Any) -> None:
        done.append(arguments)
        commit(*arguments)

    monkeypatch.setattr(export, "_commit", count)
    code, _, err = tiny.stage1(settings=SETTINGS)
    assert code == 0, err
    assert len(done) == 3 - n_kept
    assert read_bytes(tiny) == read_bytes(whole)
