"""Checks the report's tables against counts by hand, NumPy, scikit-learn and the files themselves."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from echoshift.pipeline.cards import DatasetCard, Shift
from echoshift.pipeline.segments import Manifest, Segment
from echoshift.pipeline.store.failures import write_failures
from echoshift.pipeline.store.interface import Failure
from echoshift.pipeline.store.layout import FAILED
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.train.look.report_results import (
    MAX_SHOWN_CLASSES,
    break_down,
    fold_confusion,
    gather_loose,
    list_runs,
)
from echoshift.train.look.report_tables import (
    PageTable,
    compare_labels,
    count_classes,
    count_coverage,
    count_parts,
    count_right_marks,
    draw_store_norms,
    list_absent,
    list_failures,
    read_silence,
    read_stage1_runs,
    sample_norms,
)
from echoshift.train.runs import RESULTS, RunRecord, read_runs
from echoshift.train.scores import compute_scores

CARD = DatasetCard(
    name="small",
    title="Small",
    task="single-label",
    metric="top1",
    classes=("cut", "pour", "wash"),
    domains=("a", "b", "empty"),
    shifts=(Shift(source=("a",), target="b"), Shift(source=("a",), target="empty")),
)


def make_segment(number: int, domain: str, split: str, label: str, duration_s: float) -> Segment:
    return Segment(f"{domain}-{number}", f"v{number // 2}", 1.0, 1.0 + duration_s, (label,), domain, split)


SEGMENTS = (
    make_segment(0, "a", "train", "cut", 1.0),
    make_segment(1, "a", "train", "cut", 2.0),
    make_segment(2, "a", "train", "pour", 4.0),
    make_segment(3, "a", "train", "wash", 0.5),
    make_segment(4, "a", "test", "wash", 3.0),
    make_segment(5, "b", "train", "pour", 8.0),
    make_segment(6, "b", "train", "pour", 2.0),
)
MANIFEST = Manifest("small", SEGMENTS, "0" * 64)
HAS_AUDIO = {"a-0": True, "a-1": False, "a-2": False, "b-5": True}


def read_column(table: PageTable, name: str) -> list[float | None]:
    return [row[table.columns.index(name)].value for row in table.rows]


def read_words(table: PageTable, name: str) -> list[str]:
    return [row[table.columns.index(name)].text for row in table.rows]


def open_stores(cache: Path) -> list[Any]:
    return [open_store(path) for path in list_stores(cache)]


def test_parts_and_classes_are_counted_as_by_hand() -> None:
    table = count_parts(MANIFEST, CARD, HAS_AUDIO)
    assert list(zip(read_words(table, "domain"), read_words(table, "split"), strict=True)) == [
        ("a", "train"),
        ("b", "train"),
        ("a", "test"),
    ]
    first = {name: table.rows[0][i].value for i, name in enumerate(table.columns)}
    assert (first["segments"], first["videos"], first["silent, %"]) == (4, 2, pytest.approx(200 / 3))
    assert first["total, min"] == pytest.approx(7.5 / 60)
    assert (first["shortest, s"], first["median, s"], first["longest, s"]) == (0.5, 1.5, 4.0)
    assert first["short"] == 2  # 64 frames at 60 a second are 1.07 s
    assert read_column(table, "silent, %")[1:] == [0.0, None]
    counts = count_classes(MANIFEST, CARD)
    assert [read_column(counts, name) for name in counts.columns[1:]] == [[2, 1, 1], [0, 2, 0], [0, 0, 1], [2, 3, 2]]


def test_labels_shift_by_their_total_variation() -> None:
    (row,) = compare_labels(SEGMENTS, CARD).rows  # the domain without segments can't be compared
    # a: 2/4, 1/4, 1/4; b: 0, 1, 0; half of 1/2 + 3/4 + 1/4.
    assert [cell.text for cell in row] == ["a", "b", "0.750", "pour", "25.0", "100.0"]
    assert row[2].value == pytest.approx(0.75)


def test_stores_are_counted_as_they_are(finished: Any, open_tiny: Any) -> None:
    manifest, stores = open_tiny(finished).manifest, open_stores(finished.root / "cache")
    has_audio, name = read_silence(stores)
    assert name.startswith("resnet_demo-") and len(has_audio) == 24 and all(has_audio.values())
    table = count_coverage([(store, 7_000_000) for store in stores], manifest)
    assert read_column(table, "MB") == [7.0] * len(stores) and read_column(table, "failed") == [0] * len(stores)
    for i, store in enumerate(stores):
        is_done = np.asarray(store.read_array("state")) == 1
        n_done, n_absent = (read_column(table, column)[i] for column in ("done", "absent"))
        assert n_done == is_done.sum() and n_done + n_absent == len(manifest) == 24  # type: ignore[operator]
        ids = [segment_id for segment_id, done in zip(store.segment_ids, is_done, strict=True) if done]
        n_valid = np.asarray(store.read_array("n_valid"))[is_done]
        for output in store.spec.outputs:
            values = store.read(ids, output.name).astype(np.float64)
            vectors = [row[:n].reshape(n, -1) for row, n in zip(values, n_valid.tolist(), strict=True)]
            norms, sampled = sample_norms(store, output.name)
            np.testing.assert_allclose(norms, np.linalg.norm(np.concatenate(vectors), axis=1))
            plot, words = draw_store_norms(store, output.name)
            assert plot is not None and plot.numbers["counts"][output.name].sum() == len(norms)
            assert words == f"{output.name}: norms of {len(norms)} clips; median {np.median(norms):.3g}" and not sampled


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


def test_a_failure_is_counted_with_its_reason(finished: Any, open_tiny: Any) -> None:
    store = open_stores(finished.root / "cache")[0]
    failed: Any = FailedStore(store, 3)
    write_failures(store.path, [Failure(store.segment_ids[3], "a-video", "DecodeError", "the stream ends early", True)])
    try:
        table = list_failures([failed])
    finally:
        write_failures(store.path, [])
    ((_, *row),) = [[cell.text for cell in line] for line in table.rows]
    assert row == ["DecodeError", "1", store.segment_ids[3], "the stream ends early"]
    covered = count_coverage([(failed, 0)], open_tiny(finished).manifest)
    assert read_column(covered, "failed") == [1] and read_column(covered, "done") == [len(store.segment_ids) - 1]


def test_marks_are_right_where_the_segment_lacks_the_class() -> None:
    marks = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0]], bool)
    assert count_right_marks(marks, np.array([0, 0, 1])).T.tolist() == [[2, 1, 1], [1, 1, 2], [1, 1, 3]]
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    assert count_right_marks(marks, labels)[:2].T.tolist() == [[2, 1], [1, 0], [1, 1]]


def test_stage1_is_told_as_its_steps_recorded_it(finished: Any, open_tiny: Any) -> None:
    places, records = open_tiny(finished), read_runs(finished.runs / "tiny" / RESULTS)
    (run,) = read_stage1_runs(records, finished.runs / "tiny", places)
    encoder = json.loads((finished.find_step("encoder") / "record.json").read_text())["outcome"]
    assert run.losses["total"] == tuple(epoch["losses"]["total"] for epoch in encoder["epochs"])
    clusters = json.loads((finished.find_step("clusters") / "record.json").read_text())["outcome"]["classes"]
    assert [found["sizes"] for found in run.clusters] == [found["sizes"] for found in clusters]
    marks = np.load(finished.find_step("absent_labels") / "absent.npy")
    # The target's 8 train segments are of the first two classes in turn.
    labels = np.arange(8) % 2
    right = sum(bool(marks[i, k]) and labels[i] != k for i in range(8) for k in range(3))
    assert run.absent is not None and run.absent.accuracy == pytest.approx(right / marks.sum()) and run.lost == ()
    table = list_absent("absent", "s-t", [run.absent], places.card.classes)
    assert read_column(table, "marks") == marks.sum(axis=0).tolist()
    assert read_column(table, "at random, %") == [50.0, 50.0, 100.0]
    other = places.card.model_copy(update={"shifts": places.card.shifts[1:]})
    (gone,) = read_stage1_runs(records, finished.runs / "tiny", type(places)(other, places.manifest, Path(), Path()))
    assert gone.absent is not None and gone.absent.fault.startswith("the card has no such shift any more")
    assert gone.losses and gone.absent.accuracy is None


def test_steps_whose_folders_are_gone_are_named(copied: Any, open_tiny: Any) -> None:
    (copied.find_step("clusters") / "record.json").unlink()
    (copied.find_step("audio_predictions") / "predictions.npz").unlink()
    records = read_runs(copied.runs / "tiny" / RESULTS)
    (run,) = read_stage1_runs(records, copied.runs / "tiny", open_tiny(copied))
    assert run.lost == ("clusters",) and not run.clusters
    assert run.absent is not None and run.absent.accuracy is None and "is gone" in run.absent.fault


def test_runs_of_no_grid_are_averaged_over_seeds(reported: Any) -> None:
    records = reported.records
    shown = {record.key for record in records if record.row == "gated"}
    table, (breakdown,) = gather_loose(records, shown, records[0].manifest_sha256)
    assert read_words(table, "row") == ["plain"] and breakdown.seeds == (0, 1)
    # Of 4 segments one and two are right; Student's t of 1 degree of freedom at 97.5 % is 12.706.
    assert read_column(table, "score, %") == [pytest.approx(37.5)]
    assert read_column(table, "± half width") == [pytest.approx(12.706 * 12.5, rel=1e-4)]
    other, none = gather_loose(records, shown, "another manifest")
    assert other.rows == [] and none == [] and other.notes[-1] == "Runs on another manifest that are left out: 2."


def test_a_large_confusion_is_folded_and_loses_no_segment() -> None:
    counts = np.random.default_rng(0).integers(0, 9, (5, 5))
    folded = fold_confusion(counts, [1, 3])
    assert folded[0, 0] == counts[1, 1] and folded[0, 1] == counts[1, 3]
    assert folded[0, 2] == counts[1, [0, 2, 4]].sum() and folded[2, 1] == counts[[0, 2, 4], 3].sum()
    assert folded[2, 2] == counts[np.ix_([0, 2, 4], [0, 2, 4])].sum() and folded.sum() == counts.sum()
    assert (fold_confusion(counts, range(5)) == counts).all()


def test_classes_are_averaged_and_confusions_summed_over_seeds(reported: Any) -> None:
    found = break_down("x", "plain, s-t", [record for record in reported.records if record.row == "plain"])
    # Labels 0 1 0 1; seed 0 has the first right, seed 1 the first two; what is wrong is taken for class 2.
    assert [[cell.value for cell in row[1:]] for row in found.classes.rows] == [
        [50.0, 50.0, 50.0, 2],
        [25.0, 0.0, 50.0, 2],
        [None, None, None, 0],
    ]
    assert found.confusion == (("low", "high", "never"), [[2, 0, 2], [0, 1, 3], [0, 0, 0]])
    # The last of the 4 segments alone is silent, and wrong in both.
    assert found.parts is not None and read_words(found.parts, "part") == ["silent", "audible"]
    assert read_column(found.parts, "mean, %") == [0.0, pytest.approx(50.0)]
    assert read_column(found.parts, "test segments") == [1, 3]


N, K = 30, MAX_SHOWN_CLASSES + 5


def make_multi_label(seed: int) -> tuple[RunRecord, np.ndarray, np.ndarray]:
    probabilities = np.random.default_rng(seed).random((N, K))
    labels = (np.random.default_rng(9).random((N, K)) < np.linspace(0.05, 0.9, K)).astype(np.int64)
    when = datetime(2026, 3, 4, tzinfo=UTC)
    record = RunRecord(
        dataset="many",
        stage="stage1",
        shift="a-b",
        seed=seed,
        row="one",
        config={},
        config_hash="0123456789ab",
        manifest_sha256="1" * 64,
        code_version="0.1.0",
        selection="last",
        scores=compute_scores(probabilities, labels, np.arange(N) > 3, tuple(f"class {k}" for k in range(K))),
        started=when,
        ended=when,
        duration_s=1.0,
        device="cpu",
    )
    return record, probabilities, labels


def test_of_several_labels_the_classes_with_the_most_segments_are_shown() -> None:
    records, drawn, (labels, _) = zip(*(make_multi_label(seed) for seed in (0, 1)), strict=True)
    found = break_down("x", "one, a-b", records)
    assert found.confusion is None and len(found.classes.rows) == MAX_SHOWN_CLASSES
    assert found.classes.notes == (f"The {MAX_SHOWN_CLASSES} of {K} classes with the most test segments.",)
    shown = [int(word.split()[1]) for word in read_words(found.classes, "class")]
    counts = labels.sum(axis=0)
    assert min(counts[shown]) >= sorted(counts.tolist())[K - MAX_SHOWN_CLASSES - 1]
    each = np.array([[100 * average_precision_score(labels[:, k], p[:, k]) for p in drawn] for k in shown])
    for name, expected in (("mean, %", each.mean(1)), ("lowest, %", each.min(1)), ("highest, %", each.max(1))):
        assert read_column(found.classes, name) == pytest.approx(expected.tolist())
    table = list_runs(records[:1], set())
    assert table.notes[0] == "Score: mean average precision on the target's test split."
    assert read_column(table, "score, %") == [pytest.approx(100 * records[0].scores.main.value)]
