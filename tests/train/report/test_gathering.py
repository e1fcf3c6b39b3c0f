"""Checks what the report gathers from stores, steps and records against NumPy and the files themselves."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from echoshift.pipeline.cards import read_card
from echoshift.pipeline.manifest import read_manifest
from echoshift.pipeline.store.failures import write_failures
from echoshift.pipeline.store.interface import Failure
from echoshift.pipeline.store.layout import FAILED
from echoshift.train.report.breakdowns import break_down, fold_confusion, gather_loose
from echoshift.train.report.stage1_facts import count_right_marks, read_stage1_facts
from echoshift.train.report.store_facts import describe_store, list_dataset_stores, read_silence
from echoshift.train.runs import RESULTS, keep_latest, read_runs


def test_marks_are_right_where_the_segment_lacks_the_class() -> None:
    marks = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0]], bool)
    found = count_right_marks(marks, np.array([0, 0, 1]), ("x", "y", "z"))
    assert [(c.n_marks, c.n_right, c.n_lacking) for c in found] == [(2, 1, 1), (1, 1, 2), (1, 1, 3)]
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    found = count_right_marks(marks, labels, ("x", "y", "z"))
    assert [(c.n_marks, c.n_right) for c in found] == [(2, 1), (1, 0), (1, 1)]


def test_stores_are_described_as_they_are(finished: Any) -> None:
    manifest = read_manifest(finished.root / "tiny.csv", read_card(finished.root / "tiny.toml"))
    stores = list_dataset_stores(finished.root / "cache", "tiny")
    assert stores and list_dataset_stores(finished.root / "cache", "another") == []
    has_audio, name = read_silence(stores)
    assert name.startswith("resnet_demo-") and len(has_audio) == 24 and all(has_audio.values())
    for store in stores:
        facts = describe_store(store, manifest, 7)
        state = np.asarray(store.read_array("state"))
        assert facts.n_done == int((state == 1).sum()) and facts.n_failed == facts.n_foreign == 0
        assert facts.n_done + facts.n_absent == len(manifest) == 24
        assert [norm.output for norm in facts.norms] == [output.name for output in store.spec.outputs]
        done = [segment_id for segment_id, s in zip(store.segment_ids, state, strict=True) if s == 1]
        n_valid = np.asarray(store.read_array("n_valid"))[state == 1]
        for norm in facts.norms:
            values = store.read(done, norm.output).astype(np.float64)
            vectors = np.concatenate([row[:n].reshape(n, -1) for row, n in zip(values, n_valid.tolist(), strict=True)])
            expected = np.linalg.norm(vectors, axis=1)
            assert norm.median == pytest.approx(float(np.median(expected)))
            assert sum(norm.counts) == norm.n_vectors == len(expected)


class FailedStore:
    """A store one of whose rows is failed; the rest is another's."""

    def __init__(self, store: Any, row: int) -> None:
        self._store, self._row = store, row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_array(self, name: str, *rows: int) -> np.ndarray:
        values = np.array(self._store.read_array(name, *rows))
        if name == "state":
            values[self._row] = FAILED
        return values


def test_a_failure_is_counted_with_its_reason(finished: Any) -> None:
    manifest = read_manifest(finished.root / "tiny.csv", read_card(finished.root / "tiny.toml"))
    store = list_dataset_stores(finished.root / "cache", "tiny")[0]
    failure = Failure(store.segment_ids[3], "a-video", "DecodeError", "the stream ends early", True)
    write_failures(store.path, [failure])
    try:
        facts = describe_store(FailedStore(store, 3), manifest, 7)  # type: ignore[arg-type]
    finally:
        write_failures(store.path, [])
    (reason,) = facts.failures
    assert (reason.exception, reason.n, reason.first_segment) == ("DecodeError", 1, store.segment_ids[3])
    assert reason.first_reason == "the stream ends early"
    assert facts.n_failed == 1 and facts.coverage == pytest.approx((facts.n_segments - facts.n_absent - 1) / 24)


def test_stage1_is_told_as_its_steps_recorded_it(finished: Any) -> None:
    card = read_card(finished.root / "tiny.toml")
    manifest = read_manifest(finished.root / "tiny.csv", card)
    records = read_runs(finished.runs / "tiny" / RESULTS)
    (facts,) = read_stage1_facts(records, finished.runs / "tiny", manifest, card)
    encoder = json.loads((finished.find_step("encoder") / "record.json").read_text())["outcome"]
    total = next(curve for curve in facts.losses if curve.name == "total")
    assert total.values == tuple(epoch["losses"]["total"] for epoch in encoder["epochs"])
    clusters = json.loads((finished.find_step("clusters") / "record.json").read_text())["outcome"]["classes"]
    assert [list(found.sizes) for found in facts.clusters] == [found["sizes"] for found in clusters]
    marks = np.load(finished.find_step("absent_labels") / "absent.npy")
    # The target's 8 train segments are of the first two classes in turn.
    labels = np.arange(8) % 2
    right = sum(bool(marks[i, k]) and labels[i] != k for i in range(8) for k in range(3))
    assert facts.absent is not None and facts.absent.accuracy == pytest.approx(right / marks.sum())
    assert facts.lost == ()


def test_steps_whose_folders_are_gone_are_named(copied: Any) -> None:
    card = read_card(copied.root / "tiny.toml")
    manifest = read_manifest(copied.root / "tiny.csv", card)
    (copied.find_step("clusters") / "record.json").unlink()
    (copied.find_step("audio_predictions") / "predictions.npz").unlink()
    (facts,) = read_stage1_facts(read_runs(copied.runs / "tiny" / RESULTS), copied.runs / "tiny", manifest, card)
    assert facts.lost == ("clusters",) and facts.clusters == ()
    assert facts.absent is not None and facts.absent.accuracy is None and "is gone" in facts.absent.fault


def test_a_shift_that_the_card_has_no_more_is_said(finished: Any) -> None:
    card = read_card(finished.root / "tiny.toml")
    manifest = read_manifest(finished.root / "tiny.csv", card)
    records = read_runs(finished.runs / "tiny" / RESULTS)
    other = card.model_copy(update={"shifts": card.shifts[1:]})
    (facts,) = read_stage1_facts(records, finished.runs / "tiny", manifest, other)
    assert facts.absent is not None and facts.absent.fault.startswith("the card has this shift no more")
    assert facts.losses and facts.absent.accuracy is None


def test_runs_of_no_grid_are_averaged_over_seeds(reported: Any) -> None:
    records = reported.records
    shown = frozenset(record.key for record in records if record.row == "gated")
    (loose,), n_left_out = gather_loose(records, shown, records[0].manifest_sha256)
    assert n_left_out == 0 and loose.breakdown.row == "plain" and loose.breakdown.seeds == (0, 1)
    # Of 4 segments one and two are right; Student's t of 1 degree of freedom at 97.5 % is 12.706.
    assert loose.interval is not None and loose.interval.mean == pytest.approx(37.5)
    assert loose.interval.half_width == pytest.approx(12.706 * 12.5, rel=1e-4)
    assert gather_loose(records, shown, "another manifest") == ([], 2)


def test_a_large_confusion_is_folded_and_loses_no_segment() -> None:
    counts = np.random.default_rng(0).integers(0, 9, (5, 5))
    folded = fold_confusion(counts, [1, 3])
    assert folded[0, 0] == counts[1, 1] and folded[0, 1] == counts[1, 3]
    assert folded[0, 2] == counts[1, [0, 2, 4]].sum() and folded[2, 1] == counts[[0, 2, 4], 3].sum()
    assert folded[2, 2] == counts[np.ix_([0, 2, 4], [0, 2, 4])].sum() and folded.sum() == counts.sum()
    assert (fold_confusion(counts, range(5)) == counts).all()


def test_classes_are_averaged_and_confusions_summed_over_seeds(reported: Any, tiny_records: Any) -> None:
    records = reported.records
    planned = [tiny_records.PlannedRun(r.row, r.stage, r.shift, r.seed, (), r.config, r.config_hash) for r in records]
    found = break_down(planned, keep_latest(records), "last", records[0].manifest_sha256)
    plain = next(breakdown for breakdown in found if breakdown.row == "plain")
    # Labels 0 1 0 1; seed 0 has the first right, seed 1 the first two; what is wrong is taken for class 2.
    assert plain.seeds == (0, 1)
    assert [(bar.mean, bar.low, bar.high, bar.n) for bar in plain.classes] == [
        (50.0, 50.0, 50.0, 2),
        (25.0, 0.0, 50.0, 2),
        (None, None, None, 0),
    ]
    assert plain.confusion == ((2, 0, 2), (0, 1, 3), (0, 0, 0)) and plain.confused == ("low", "high", "never")
    # The last of the 4 segments alone is silent, and wrong in both.
    assert [(part.name, part.mean, part.n) for part in plain.parts] == [
        ("silent", 0.0, 1),
        ("audible", pytest.approx(50.0), 3),
    ]
    assert break_down(planned, keep_latest(records), "last", "another manifest") == []
