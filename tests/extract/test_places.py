"""Checks the command line on places that fail or are far: a URL, a full disk, a read-only cache, a clock that jumps."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from echoshift.pipeline.cards import write_card
from echoshift.pipeline.manifest import write_manifest
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.location import locate
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.pipeline.store.verify import verify_store

SEGMENTS = tuple(Segment(f"v-{i}", "v", 0.05 * i, 0.05 * i + 0.6, ("a",), "d", "train") for i in range(12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_dataset) -> Path:
    root = tmp_path_factory.mktemp("places")
    write_card(root / "tiny.toml", tiny_dataset.CARD)
    write_manifest(root / "tiny.csv", SEGMENTS)
    tiny_dataset.write_video(root / "media/v.mp4", sound="none")
    return root


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> dict[str, bytes]:
    done = run("extract", folder, folder / "unbroken")
    assert done.returncode == 0, done.stderr
    return read_every_array(folder / "unbroken")


def run(command: str, folder: Path, cache: object, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `echoshift extract` or `echoshift store …` in this process, as the console script does."""
    from echoshift.cli.app import main

    arguments = [*command.split(), *options]
    if command == "extract":
        arguments[1:1] = ["tiny", "--media", str(folder / "media"), "--cache", str(cache), "--manifests", str(folder)]
        arguments += ["--encoders", "slowfast_demo", "--device", "cpu", "--rows-per-shard", "4", "--dtype", "float32"]
        arguments += ["--set", "clip.n_clips=2", "--outputs", "slowfast_demo=pooled,trunk_slow"]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["echoshift", *arguments])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def read_every_array(cache: object) -> dict[str, bytes]:
    (place,) = list_stores(cache)
    store = open_store(place)
    names = [f"outputs/{o.name}" for o in store.spec.outputs]
    names += ["times", "frames", "n_valid", "digest", "state", "segment_id"]
    return {name: store.read_array(name).tobytes() for name in names}


@pytest.mark.slow
def test_the_command_line_works_on_a_url(folder: Path, unbroken: dict[str, bytes], s3_bucket: str) -> None:
    cache = f"{s3_bucket}/x"
    done = run("extract", folder, cache)
    assert done.returncode == 0, done.stderr
    assert read_every_array(cache) == unbroken
    again = run("extract", folder, cache)
    assert again.returncode == 0 and count_computed(again.stdout) == 0
    (place,) = list_stores(cache)
    store = open_store(place)
    store.begin_shard(store_shard(store, 1))  # as a run killed inside it leaves it
    resumed = run("extract", folder, cache)
    assert resumed.returncode == 0 and count_computed(resumed.stdout) == 4 and read_every_array(cache) == unbroken
    for command, words in {
        "store ls --cache " + cache: str(place),
        f"store info {place}": "rows: 12 done",
        f"store verify {place}": "12 rows, no fault",
        f"store explain v-3 {place} --media {folder / 'media'} --manifests {folder}": "segment v-3: done; row 3 of",
        f"store export {place} --to {folder / 'far.npz'}": "wrote 12 segments",
    }.items():
        shown = run(command, folder, cache)
        assert (shown.returncode, words in shown.stdout) == (0, True), (command, shown.stdout, shown.stderr)
        assert "secret" not in shown.stdout + shown.stderr
    with np.load(folder / "far.npz") as archive:
        assert archive["features"].tobytes() == unbroken["outputs/pooled"]
    refused = run("extract", folder, cache, "--backend", "hdf5")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "HDF5 is local and single-writer" in refused.stderr
    everything = json.dumps(dict(store.attributes)) + str(locate(place).beside(".runs.jsonl").read_text())
    assert "a-secret-key" not in everything and "an-access-key" not in everything


def store_shard(store, index: int):
    from echoshift.pipeline.store.layout import plan_shards

    return plan_shards(store.layout)[index]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs; a test gives it the size it needs by mounting it anew."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = mount("-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", str(disk))
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


def resize(disk: Path, size: str) -> None:
    assert mount("-o", f"remount,{size}", str(disk)).returncode == 0


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
@pytest.mark.usefixtures("unbroken")
def test_a_disk_that_has_no_room_for_all_rows_is_refused_up_front(small_disk: Path, folder: Path, backend: str) -> None:
    resize(small_disk, "size=1m")
    refused = run("extract", folder, small_disk / "cache", "--backend", backend)
    assert (refused.returncode, refused.stderr.count("\n"), refused.stdout) == (2, 1, "")
    needed, free = read_numbers(refused.stderr, "bytes are to be written", "are free")
    pooled_and_trunk = 12 * 2 * 4 * (576 + trunk_size(folder))
    assert pooled_and_trunk <= needed <= pooled_and_trunk + 2**20
    assert 0 < free <= 2**20 and str(small_disk) in refused.stderr
    assert not list(small_disk.rglob("*.h5*creating*"))


def trunk_size(folder: Path) -> int:
    (place,) = list_stores(folder / "unbroken")
    return int(np.prod(next(o.shape for o in open_store(place).spec.outputs if o.name == "trunk_slow")))


def read_numbers(text: str, *phrases: str) -> list[int]:
    return [int(text.split(f" {phrase}")[0].split()[-1].replace(",", "")) for phrase in phrases]


def count_computed(table: str) -> int:
    """Read the column `computed now` of the one store in a run's table."""
    encoder, _done, _silent, _failed, computed, *_ = table.splitlines()[2].split()
    assert encoder == "slowfast_demo"
    return int(computed)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(small_disk, folder, unbroken):
    cache = small_disk / "cache"
    n_bytes = sum(map(len, unbroken.values()))
    resize(small_disk, f"size={n_bytes // 2 // 4096 * 4096 + 2**18}")
    full = run("extract", folder, cache, "--allow-full-disk")
    message = full.stderr.splitlines()[-1]  # before it come lines of progress, where the machine is slow
    assert (full.returncode, full.stderr.count("error")) == (2, 1), full.stderr
    assert message.startswith(f"error: no space left for {cache}/tiny/slowfast_demo-")
    assert "bytes are free there; free some, or give another --cache" in message
    (place,) = list_stores(cache)
    n_done = int((open_store(place).read_array("state") == DONE).sum())
    assert 0 < n_done < 12 and n_done % 4 == 0
    assert verify_store(open_store(place)) == []
    assert not list(small_disk.rglob("*.partial")) and not list(small_disk.rglob("*.creating-*"))
    resize(small_disk, "size=64m")
    done = run("extract", folder, cache)
    assert done.returncode == 0, done.stderr
    assert count_computed(done.stdout) == 12 - n_done
    assert read_every_array(cache) == unbroken
    assert verify_store(open_store(place)) == []


def test_a_read_only_cache_can_be_read_and_a_run_with_work_to_do_is_refused(small_disk, folder, unbroken):
    resize(small_disk, "size=64m")
    cache = small_disk / "cache"
    subprocess.run(["cp", "-r", str(folder / "unbroken"), str(cache)], check=True)
    (place,) = list_stores(cache)
    locate(place).beside(".lock").unlink()
    resize(small_disk, "ro")
    before = sorted(small_disk.rglob("*"))
    nothing_to_do = run("extract", folder, cache)
    assert nothing_to_do.returncode == 0, nothing_to_do.stderr
    for command in (
        f"store ls --cache {cache}",
        f"store info {place}",
        f"store verify {place}",
        f"store explain v-3 {place} --media {folder / 'media'} --manifests {folder}",
        f"store export {place} --to {folder / 'read-only.npz'}",
    ):
        shown = run(command, folder, cache)
        assert (shown.returncode, shown.stderr) == (0, ""), command
    for options in (("--set", "clip.stride=3"), ("--backend", "hdf5")):
        refused = run("extract", folder, cache, *options)
        assert (refused.returncode, refused.stderr.count("\n"), refused.stdout) == (2, 1, "")
        assert f"no right to write {cache}/tiny/slowfast_demo-" in refused.stderr
        assert "Read-only file system" in refused.stderr
    resize(small_disk, "rw")
    store = open_store(place)
    store.begin_shard(store_shard(store, 2))
    resize(small_disk, "ro")
    pending = run("extract", folder, cache)
    assert (pending.returncode, pending.stderr.count("\n")) == (2, 1)
    assert "no right to write" in pending.stderr
    assert sorted(small_disk.rglob("*")) == before


@pytest.mark.alone
def test_a_clock_that_jumps_changes_nothing(folder, unbroken, s3_bucket, monkeypatch):
    from echoshift.pipeline.errors import StoreBusyError
    from echoshift.pipeline.store.lock import hold_store

    year_s = 365 * 86400.0
    real, now = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + now[0])
    for place in (f"{s3_bucket}/c/tiny/a.zarr", folder / "c/tiny/a.zarr"):
        now[0] = 0.0
        with hold_store(place) as hold:
            for now[0] in (year_s, -year_s):
                hold.check()
                with pytest.raises(StoreBusyError), hold_store(place, wait_s=0.2):
                    pass
    now[0] = 0.0
    for jump_s in (year_s, -year_s):
        when = real() + jump_s
        for file in (*(folder / "unbroken").rglob("*"), *(folder / "media").rglob("*")):
            os.utime(file, (when, when))
        again = run("extract", folder, folder / "unbroken")
        assert again.returncode == 0 and count_computed(again.stdout) == 0
        assert read_every_array(folder / "unbroken") == unbroken
