import json
import multiprocessing
import os
import re
import signal
import subprocess
import time
import warnings
from datetime import UTC, datetime
from errno import ENOSPC

import numpy as np
import pytest

from echoshift.pipeline.errors import RunError
from echoshift.train import runs
from echoshift.train.alignment.config import AlignmentConfig, keep_used
from echoshift.train.alignment.methods.orth import Orthogonality
from echoshift.train.runs import (
    RunRecord,
    TornLineWarning,
    append_run,
    describe_code_version,
    hash_config,
    keep_latest,
    read_runs,
)
from echoshift.train.scores import compute_scores
from echoshift.train.steps import hash_json

SCORES = compute_scores(np.array([[0.7, 0.3], [0.2, 0.8]]), np.array([0, 0]), np.array([True, False]), ("a", "b"))


def make_record(**changes):
    config = changes.pop("config", {"absent": {"weight": 1.0}, "n": 3})
    fields = {
        "dataset": "demo",
        "stage": "stage1",
        "shift": "a-b",
        "seed": 0,
        "row": "V",
        "config": config,
        "config_hash": hash_config(config),
        "steps": {"encoder": "0123456789ab"},
        "fingerprints": {"slowfast_demo": "ba9876543210"},
        "manifest_sha256": "f" * 64,
        "code_version": "0.1.0",
        "selection": "last",
        "scores": SCORES,
        "started": datetime(2026, 11, 25, 9, 0, tzinfo=UTC),
        "ended": datetime(2026, 11, 25, 9, 1, tzinfo=UTC),
        "duration_s": 60.0,
        "device": "cpu",
        **changes,
    }
    return RunRecord(**fields)


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "demo" / "results.jsonl"
    assert read_runs(path) == []
    written = [make_record(), make_record(seed=1, row="", steps={}), make_record(seed=1, selection="source_val")]
    for record in written:
        append_run(path, record)
    assert read_runs(path) == written
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("n_left", [1, 20, 1.0])
def test_a_torn_last_line_is_named_and_passed_over(tmp_path, n_left):
    path = tmp_path / "results.jsonl"
    append_run(path, make_record(seed=0))
    whole = path.read_bytes()
    append_run(path, make_record(seed=1))
    second = path.read_bytes()[len(whole) :]
    # 1.0: all but the last brace and the end of the line.
    path.write_bytes(whole + second[: len(second) - 2 if n_left == 1.0 else n_left])
    with pytest.warns(TornLineWarning, match=re.escape(f"{path}:2: a line torn")):
        assert [r.seed for r in read_runs(path)] == [0]
    append_run(path, make_record(seed=2))
    with pytest.warns(TornLineWarning, match=re.escape(f"{path}:2: a line torn")):
        assert [r.seed for r in read_runs(path)] == [0, 2]


def test_a_line_that_lost_only_its_end_is_whole(tmp_path, recwarn):
    path = tmp_path / "results.jsonl"
    append_run(path, make_record(seed=0))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    append_run(path, make_record(seed=1))
    assert [r.seed for r in read_runs(path)] == [0, 1]
    assert not recwarn.list


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{}", "results.jsonl:2: not a run's record: dataset: Field required"),
        ("3", "results.jsonl:2: not a run's record"),
        (
            make_record().model_dump_json().replace('"seed":0', '"seed":0,"sede":0'),
            ":2: not a run's record: sede: Extra",
        ),
    ],
)
def test_a_whole_line_that_is_no_record_is_an_error(tmp_path, line, words):
    path = tmp_path / "results.jsonl"
    append_run(path, make_record())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match=words):
        read_runs(path)


def append_many(path, seeds):
    for seed in seeds:
        append_run(path, make_record(seed=seed))


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=append_many, args=(path, range(i, 60, 3))) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(r.seed for r in read_runs(path)) == list(range(60))


def test_a_kill_leaves_whole_lines_and_at_most_one_torn(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork")
    for n_kills in range(1, 6):
        worker = context.Process(target=append_many, args=(path, range(10_000)))
        size = path.stat().st_size if path.exists() else 0
        worker.start()
        deadline = time.monotonic() + 30
        while (not path.exists() or path.stat().st_size < size + 3000) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(30)
        append_run(path, make_record(row="after"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            records = read_runs(path)
        assert len(caught) <= n_kills
        assert len(records) + len(caught) == path.read_bytes().count(b"\n")
        assert records[-1].row == "after"
        assert [r.row for r in records].count("after") == n_kills


def test_a_disk_without_room_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    append_run(path, make_record())
    before, write = path.read_bytes(), os.write

    def fill(file, data):
        if len(data) < 200:
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        return write(file, data[:100])

    monkeypatch.setattr(runs.os, "write", fill)
    with pytest.raises(RunError, match="can't append a run: No space left"):
        append_run(path, make_record(seed=1))
    assert path.read_bytes() == before


def test_a_held_lock_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_LOCK_TIMEOUT_S", 0.05)
    path = tmp_path / "results.jsonl"
    with runs.FileLock(f"{path}.lock"), pytest.raises(RunError, match=r"results.jsonl.lock is held"):
        append_run(path, make_record())
    assert not path.exists()


def test_the_latest_record_of_a_key_wins():
    records = [
        make_record(device="first"),
        make_record(seed=1),
        make_record(config={"n": 4}),
        make_record(selection="target_oracle"),
        make_record(device="second", row="another grid's name"),
    ]
    latest = keep_latest(records)
    assert [(r.seed, r.device, r.selection) for r in latest.values()] == [
        (0, "second", "last"),
        (1, "cpu", "last"),
        (0, "cpu", "last"),
        (0, "cpu", "target_oracle"),
    ]


def test_a_hash_depends_on_values_alone():
    first = hash_config({"a": {"x": 1, "y": [1, 2]}, "b": None})
    assert first == hash_config({"b": None, "a": {"y": (1, 2), "x": 1}})
    assert re.fullmatch("[0-9a-f]{12}", first)
    assert first != hash_config({"a": {"x": 1, "y": [2, 1]}, "b": None})


def test_a_time_without_a_zone_is_refused():
    with pytest.raises(ValueError, match="without a time zone"):
        make_record(started=datetime(2026, 11, 25))


def test_the_code_version_names_the_commit():
    root = runs.Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert commit in describe_code_version()


@pytest.mark.parametrize("stage", ["alignment", "stage1"])
def test_a_new_methods_field_changes_no_other_methods_names(stage):
    class Wider(AlignmentConfig):
        new_method: Orthogonality.Settings = Orthogonality.Settings()

    def describe(kind, **settings):
        method = kind(method="rna", **settings).model_dump(mode="json")
        if stage == "stage1":
            return {"objective": {"enabled": True, **method}}
        return {"alignment": {"alignment": method}, "streams": [{"alignment": {"alignment": method}, "stage1": None}]}

    before = describe(AlignmentConfig)
    assert "new_method" in str(describe(Wider)) and hash_config(describe(Wider)) == hash_config(before)
    assert hash_config(describe(AlignmentConfig, rna={"weight": 2})) != hash_config(before)
    assert keep_used(Wider(method="mm_sada", setting="uda").model_dump(mode="json")) == keep_used(
        AlignmentConfig(method="mm_sada", setting="uda").model_dump(mode="json")
    )


def test_records_whose_hash_held_all_methods_fields_count_as_ever(tmp_path):
    config = {"alignment": {"alignment": AlignmentConfig(method="rna").model_dump(mode="json")}}
    line = json.loads(make_record(stage="alignment", config=config).model_dump_json())
    line["config_hash"] = hash_json(config)  # as written before 2026-12
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    [record] = read_runs(tmp_path / "results.jsonl")
    assert record.config_hash == hash_config(config) != line["config_hash"]
