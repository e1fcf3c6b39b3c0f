"""Checks alignment from the cache to scores: which rows are opened, what is trained once, what each rule says."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_shift

from echoshift.pipeline.cards import read_dataset_card
from echoshift.pipeline.manifest import read_manifest, write_manifest
from echoshift.train.runs import RESULTS, RunRecord, read_runs

SETTINGS = (
    "alignment.network.width=8",
    "iterations.n_steps=30",
    "iterations.n_batch=8",
    "iterations.lr_drop_step=10",
    "iterations.n_checkpoints=3",
    "iterations.checkpoint_every=5",
)
LABELS = np.array([0, 1, 0, 1])


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """Extract the small data set's features; nobody changes them."""
    root = tmp_path_factory.mktemp("alignment")
    tiny = tiny_shift.TinyShift(root, root / "runs")
    tiny.make()
    places = ["--media", tiny.media, "--cache", root / "cache", "--manifests", root, "--device", "cpu"]
    for encoder, settings in (
        ("slowfast_demo", ("frame.short_side=36", "frame.crop=32", "clip.n_frames=4")),
        ("resnet_demo", ("audio.duration_s=1.0",)),
    ):
        chosen = [part for setting in settings for part in ("--set", setting)]
        code, _, err = tiny_shift.run("extract", "tiny", *places, "--encoders", encoder, *chosen)
        assert code == 0, err
    return tiny


def try_to_align(tiny: Any, *settings: str, shift: str = "s-t", cache: str = "cache") -> tuple[int, str, str]:
    chosen = [part for s in (*SETTINGS, *settings) for part in ("--set", s)]
    places = ["--cache", tiny.root / cache, "--manifests", tiny.root, "--runs", tiny.runs, "--device", "cpu"]
    return tiny_shift.run("align", "tiny", "--shift", shift, *places, *chosen)


def align(tiny: Any, method: str, *settings: str, shift: str = "s-t") -> RunRecord:
    """Run `echoshift align` and return its last record."""
    code, _, err = try_to_align(tiny, f"alignment.method={method}", *settings, shift=shift)
    assert code == 0, err
    return read_runs(tiny.runs / "tiny" / RESULTS)[-1]


def list_records(tiny: Any) -> list[RunRecord]:
    return read_runs(tiny.runs / "tiny" / RESULTS)


def read_epochs(tiny: Any, record: RunRecord, method: str) -> tuple[list[str], np.ndarray]:
    with np.load(tiny.steps / f"{method}_rgb-{record.steps['trained_rgb']}" / "epochs.npz") as arrays:
        return arrays["target_test ids"].tolist(), arrays["target_test"]


def test_the_score_is_the_mean_over_the_last_checkpoints(aligned, tmp_path):
    tiny = aligned.with_runs(tmp_path)
    align(tiny, "rna")
    mean, last = list_records(tiny)
    assert (mean.selection, last.selection) == ("mean_last", "last")
    ids, epochs = read_epochs(tiny, mean, "rna")
    rows = [ids.index(f"t-test-{i}") for i in range(4)]
    accuracies = (epochs[:, rows].argmax(axis=2) == LABELS).mean(axis=1)
    assert len(accuracies) == 3
    assert mean.scores.main.value == pytest.approx(accuracies.mean())
    assert last.scores.main.value == pytest.approx(accuracies[-1])
    assert mean.scores.confusion is None and last.scores.confusion is not None


def test_domain_generalisation_opens_no_row_of_the_target(aligned, tmp_path, monkeypatch):
    """Until the network is trained, nothing but the source's train split is read from a store."""
    from echoshift.train import run_method
    from echoshift.train.alignment import run

    opened: list[str] = []
    trained: list[list[str]] = []
    open_rows, train_run = run_method.open_rows, run_method.train_run

    def watch_rows(inputs: Any, segment_ids: tuple[str, ...], *rest: Any) -> Any:
        opened.extend(segment_ids)
        return open_rows(inputs, segment_ids, *rest)

    def watch_training(*arguments: Any) -> Any:
        found = train_run(*arguments)
        trained.append(list(opened))
        return found

    monkeypatch.setattr(run, "open_rows", watch_rows)
    monkeypatch.setattr(run_method, "train_run", watch_training)
    align(aligned.with_runs(tmp_path), "rna")
    assert len(trained) == 1
    assert set(trained[0]) == {f"s-train-{i}" for i in range(8)}
    assert {f"t-test-{i}" for i in range(4)} <= set(opened), "it is predicted, afterwards"


def test_one_source_only_network_serves_every_target(aligned, tmp_path):
    """A manifest with a third domain: the network that was trained on s is scored on t and on u."""
    tiny = replace(aligned, root=tmp_path, runs=tmp_path / "runs")
    shutil.copytree(aligned.root / "cache", tmp_path / "cache")
    from echoshift.pipeline.cards import Shift

    shifts = tuple(Shift(source=("s",), target=target) for target in ("t", "u"))
    tiny.write_card(domains=("s", "t", "u"), shifts=shifts)
    segments = list(read_manifest(aligned.root / "tiny.csv", read_dataset_card("tiny", aligned.root)))
    # The features of t serve as those of u: half of t's test segments change their domain.
    moved = [replace(s, domain="u") if s.segment_id in ("t-test-2", "t-test-3") else s for s in segments]
    moved = [replace(s, domain="u") if s.segment_id in ("t-train-6", "t-train-7") else s for s in moved]
    (tmp_path / "tiny.csv").unlink(missing_ok=True)
    write_manifest(tmp_path / "tiny.csv", moved)
    first = align(tiny, "source_only", shift="s-t")
    before = tiny.list_records()
    second = align(tiny, "source_only", shift="s-u")
    assert first.steps["trained_rgb"] == second.steps["trained_rgb"]
    fresh = [name for name in tiny.list_records() if name not in before]
    assert not [name for name in fresh if name.startswith("source_only")]
    adapted = align(tiny, "grl", "alignment.setting=uda", shift="s-t")
    assert align(tiny, "grl", "alignment.setting=uda", shift="s-u").steps != adapted.steps


def test_supervised_trains_on_the_target_s_own_labels(aligned, tmp_path):
    tiny = aligned.with_runs(tmp_path)
    supervised = align(tiny, "source_only", "alignment.setting=supervised")
    own = align(tiny, "source_only", shift="t-s")
    assert supervised.steps["trained_rgb"] == own.steps["trained_rgb"], "training on t is training on t"


@pytest.mark.parametrize("setting", ["dg", "uda"])
def test_other_labels_of_the_target_train_the_same_network(aligned, tmp_path, setting):
    tiny = replace(aligned, root=tmp_path, runs=tmp_path / "runs")
    shutil.copytree(aligned.root / "cache", tmp_path / "cache")
    tiny.write_card()
    segments = list(read_manifest(aligned.root / "tiny.csv", read_dataset_card("tiny", aligned.root)))
    records = []
    for label in ("never", "low"):
        changed = [replace(s, labels=(label,)) if s.domain == "t" else s for s in segments]
        (tmp_path / "tiny.csv").unlink(missing_ok=True)
        write_manifest(tmp_path / "tiny.csv", changed)
        records.append(align(tiny, "rna", f"alignment.setting={setting}"))
    assert {name for name in records[0].steps if records[0].steps[name] != records[1].steps[name]} == {"scores"}


def test_what_is_not_in_the_cache_or_there_twice_is_said(aligned, tmp_path):
    tiny = aligned.with_runs(tmp_path)
    code, _, err = try_to_align(tiny, cache="none")
    assert code == 2
    assert "pooled features of tiny by slowfast_demo are wanted from one store" in err and "has none" in err
    code, _, err = try_to_align(tiny, "alignment.method=rnaa")
    assert code == 2
    assert "unknown method 'rnaa'; did you mean 'rna'" in err


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_setting(aligned, tmp_path):
    code, _, err = try_to_align(aligned.with_runs(tmp_path), "iterations.lr=1e30")
    assert code == 2
    assert "the loss is no number any more" in err and "lower iterations.lr (1e+30)" in err
    assert not list_records(aligned.with_runs(tmp_path))


def test_a_killed_stream_is_said_kept_and_said_again(aligned, tmp_path):
    tiny = aligned.with_runs(tmp_path)
    # 1e4 a step throws every unit to one side, but no further: a dead ReLU has no gradient.
    for _ in range(2):
        code, _, err = try_to_align(tiny, "alignment.method=source_only", "iterations.lr=1e4")
        assert code == 0, err
        [line] = [line for line in err.splitlines() if "the same for every segment" in line]
        assert line.startswith("s-t, seed 0: training has left 100.0% of the units of ")
        assert line.endswith("lower iterations.lr (10000)")
    record = list_records(tiny)[-1]
    assert record.warnings and line == f"s-t, seed 0: {record.warnings[0]}"
    assert not [text for text in align(tiny, "source_only").warnings if "training has left" in text]
