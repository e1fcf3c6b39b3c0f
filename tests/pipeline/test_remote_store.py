"""Checks stores, ledgers and locks on a URL, against a local S3-compatible server."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_store
from tiny_store import make_spec, make_values
from typer.testing import CliRunner

from echoshift.cli import stores as store_commands
from echoshift.pipeline.errors import StoreBusyError, StoreError
from echoshift.pipeline.execution import ShardReport, ShardTask, commit_report
from echoshift.pipeline.store.failures import append_run, read_failures
from echoshift.pipeline.store.interface import FeatureStore
from echoshift.pipeline.store.layout import plan_shards
from echoshift.pipeline.store.location import locate
from echoshift.pipeline.store.lock import hold_store, remove_lock
from echoshift.pipeline.store.open import has_store, list_stores, name_store, open_store
from echoshift.pipeline.store.verify import verify_store

SPEC = make_spec({"pooled": (5,)})


def make_store(cache: str | Path) -> FeatureStore:
    return tiny_store.make_store(name_store(cache, "toy", SPEC, "zarr"), SPEC)


def fill(store: FeatureStore, failed: frozenset[int] = frozenset()) -> None:
    with hold_store(store.path) as hold:
        tiny_store.fill(store, failed, hold=hold)


def read_pooled(place: str) -> bytes:
    """Read in another process, or thread, all that it knows being the place."""
    return open_store(place).read_all("pooled").tobytes()


def list_objects(cache: str) -> dict[str, bytes]:
    import fsspec

    fs, path = fsspec.core.url_to_fs(cache, use_listings_cache=False)
    return {name.removeprefix(path): fs.cat_file(name) for name in fs.find(path)}


def test_a_store_on_a_url_holds_the_bytes_of_a_local_one(s3_bucket: str, tmp_path: Path) -> None:
    cache = f"{s3_bucket}/one"
    remote, local = make_store(cache), make_store(tmp_path / "one")
    fill(remote, failed=frozenset({9}))
    fill(local, failed=frozenset({9}))
    objects, files = list_objects(cache), list_objects(str(tmp_path / "one"))
    assert {k for k in files if not k.endswith(".lock")} == set(objects)
    differing = [k for k in objects if objects[k] != files[k]]
    assert [k for k in differing if not k.endswith(".zarr/zarr.json")] == []  # which says when it was created
    assert verify_store(open_store(remote.path)) == []
    assert [str(p) for p in list_stores(cache)] == [remote.path]
    assert open_store(remote.path).read(["s003"], "pooled").tobytes() == make_values(np.asarray([3]), 5).tobytes()
    one = open_store(remote.path).read_clips(["s003", "s004"], "pooled", np.array([1, 0]))
    assert one.tobytes() == make_values(np.asarray([3, 4]), 5)[[0, 1], [1, 0]].tobytes()
    assert read_failures(remote.path) == read_failures(local.path)
    append_run(remote.path, {"n": 1})
    append_run(remote.path, {"n": 2})
    assert locate(remote.path).beside(".runs.jsonl").read_text() == '{"n": 1}\n{"n": 2}\n'


def test_absent_and_damaged_objects_are_found_and_rows_appended(s3_bucket: str) -> None:
    store = make_store(f"{s3_bucket}/faults")
    fill(store)
    chunk = locate(store.path) / "outputs" / "pooled" / "c"
    (chunk / "1/0/0").unlink()
    damaged = chunk / "2/0/0"
    damaged.write_text("x" * (4 * 3 * 5 * 8 + 4))
    found = [(f.array, f.segment_id, f.message[:20]) for f in verify_store(open_store(store.path))]
    assert [f[:2] for f in found] == [("outputs/pooled", "s008"), ("outputs/pooled", "s016")]
    assert found[0][2] == "chunk c/1/0/0 is abs"
    store.extend(["new"], 3)
    store = open_store(store.path)
    assert (store.segment_ids[-1], store.read_array("state").tolist()) == ("new", [1] * 20 + [0])


def test_what_lacks_its_root_metadata_is_no_store_and_is_made_anew(s3_bucket: str) -> None:
    store = make_store(f"{s3_bucket}/left")
    fill(store)
    (locate(store.path) / "zarr.json").unlink()
    assert not has_store(store.path) and list_stores(f"{s3_bucket}/left") == []
    with pytest.raises(StoreError, match="no feature store at s3://"):
        open_store(store.path)
    again = make_store(f"{s3_bucket}/left")
    assert not again.read_array("state").any()
    assert not [k for k in list_objects(f"{s3_bucket}/left") if "/outputs/pooled/c/" in k]


def test_threads_and_other_processes_open_the_place_themselves(s3_bucket: str) -> None:
    store = make_store(f"{s3_bucket}/many")
    fill(store)
    expected = make_values(np.arange(20), 5).tobytes()
    assert pickle.loads(pickle.dumps(locate(store.path))) == locate(store.path)
    with ThreadPoolExecutor(3) as threads:
        assert set(threads.map(read_pooled, [store.path] * 6)) == {expected}
        assert set(threads.map(lambda _: store.read_all("pooled").tobytes(), range(6))) == {expected}
    code = (
        "import sys; from echoshift.pipeline.store.open import open_store; "
        "sys.stdout.buffer.write(open_store(sys.argv[1]).read_all('pooled').tobytes())"
    )
    assert subprocess.run([sys.executable, "-c", code, store.path], capture_output=True, check=True).stdout == expected


def test_hdf5_passwords_unknown_protocols_and_missing_drivers_are_refused(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match=r"HDF5 is local and single-writer; on a URL use Zarr"):
        name_store(s3_bucket, "toy", SPEC, "hdf5")
    with pytest.raises(StoreError, match=r"HDF5 is local and single-writer"):
        open_store(f"{s3_bucket}/toy/a.h5")
    with pytest.raises(StoreError, match="may hold no password") as caught:
        locate("ftp://me:secret@host/x")
    assert "secret" not in str(caught.value)
    with pytest.raises(StoreError, match="a URL has two slashes"):
        locate(Path("s3://bucket/x"))
    with pytest.raises(StoreError, match="Protocol not known: nix"):
        list_stores("nix://bucket/x")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StoreError, match=r"gs:// needs the package gcsfs: pip install gcsfs"):
        open_store("gs://bucket/x/y.zarr")


def test_a_server_that_is_away_is_one_error_that_says_where_options_come_from(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    from fsspec.config import conf, set_conf_env

    monkeypatch.setitem(conf, "s3", {})
    set_conf_env(conf)
    conf["s3"]["config_kwargs"] = {"retries": {"max_attempts": 0}}
    with pytest.raises(StoreError, match=r"127.0.0.1:9.*takes options from AWS_\* variables \(AWS_ENDPOINT_URL"):
        list_stores(f"{s3_bucket}/away")


def test_a_lock_on_a_url_is_refused_with_its_holder_and_the_remedy_or_waited_for(s3_bucket: str) -> None:
    place = f"{s3_bucket}/hold/toy/a.zarr"
    told: list[str] = []
    with hold_store(place):
        for wait_s in (None, 0.3):
            with (
                pytest.raises(StoreBusyError, match=r"by process \d+ of .* \(dataset toy\); .*store unlock s3://"),
                hold_store(place, wait_s=wait_s, notify=told.append),
            ):
                pass
    assert len(told) == 1 and told[0].startswith("waiting for process")
    entered, waits = threading.Event(), threading.Event()

    def wait_for_it() -> None:
        with hold_store(place, wait_s=20, notify=lambda message: waits.set()):
            entered.set()

    with hold_store(place):
        waiter = threading.Thread(target=wait_for_it)
        waiter.start()
        assert waits.wait(20) and not entered.is_set()
    waiter.join()
    assert entered.is_set()
    assert not locate(place).beside(".holder.json").exists()


def test_a_lock_left_by_a_dead_process_is_removed_and_its_holder_writes_nothing_more(s3_bucket: str) -> None:
    store = make_store(f"{s3_bucket}/taken")
    with hold_store(store.path) as hold:
        assert re.match(r"process \d+ of .* on .* since .* \(dataset ", remove_lock(store.path))
        assert remove_lock(store.path) == ""
        run = CliRunner().invoke(store_commands.app, ["unlock", store.path])
        assert (run.exit_code, run.output) == (0, f"{store.path} has no lock\n")
        with hold_store(store.path):
            before = list_objects(f"{s3_bucket}/taken")
            task = ShardTask(plan_shards(store.layout)[0], (store.path,))
            with pytest.raises(StoreError, match="its lock was removed while this process had it; nothing more is"):
                commit_report({store.path: store}, ShardReport(task, {store.path: None}), {store.path: hold})
            assert list_objects(f"{s3_bucket}/taken") == before
    assert not locate(store.path).beside(".holder.json").exists()
