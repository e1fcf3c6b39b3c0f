"""Kills `echoshift extract` in processes of its own, and starts it where nothing is to do: bytes, and imports."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.pipeline.store.verify import verify_store

CHOICES = ("--set", "slowfast_demo.clip.n_clips=2", "--rows-per-shard", "4")


def start_command(tiny: Any, cache: Path, backend: str, blocked: str = "") -> subprocess.Popen[str]:
    """Start `echoshift extract` in a process of its own, where the package `blocked` can't be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked.split()!r}))"
    command = f"{block}; from echoshift.cli.app import main; main()"
    arguments = ["extract", "tiny", "--media", str(tiny.media), "--cache", str(cache), "--manifests", str(tiny.root)]
    arguments += ["--backend", backend, "--device", "cpu", *CHOICES]
    return subprocess.Popen(
        [sys.executable, "-c", command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def count_done(cache: Path) -> int:
    return sum(int((open_store(path).read_array("state") == DONE).sum()) for path in list_stores(cache))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("backend", "n_kills"),
    [("zarr", 2), pytest.param("zarr", 10, marks=pytest.mark.slow), pytest.param("hdf5", 10, marks=pytest.mark.slow)],
)
def test_kills_and_a_last_run_end_in_the_bytes_of_an_unbroken_run(tiny, tiny_dataset, backend, n_kills):
    for i in range(4):
        tiny_dataset.write_video(tiny.media / f"v{i}.mp4", seed=i, sound="none" if i == 3 else "noise")
    starts = [0.04 * j for j in range(max(20, 5 * n_kills))]
    segments = [
        Segment(f"v{i}-{j}", f"v{i}", start, start + 1.1, ("a",), "d", "train")
        for i in range(4)
        for j, start in enumerate(starts)
    ]
    tiny.write_manifest(segments)
    unbroken, broken = tiny.root / "unbroken", tiny.root / "broken"
    assert tiny.extract(*CHOICES, "--backend", backend, "--cache", unbroken)[0] == 0
    assert count_done(unbroken) == 2 * len(segments)
    rng = random.Random(backend)
    seen = [0]
    for _ in range(n_kills):
        process = start_command(tiny, broken, backend)
        goal = seen[-1] + rng.randint(1, 2 * len(segments) // (n_kills + 1))
        while count_done(broken) < goal and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.1))  # about as long as a shard takes
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.communicate()
        seen.append(count_done(broken))
    assert seen == sorted(seen), "a kill took away rows that were done"
    assert 0 < seen[-1] < 2 * len(segments)
    finish(start_command(tiny, broken, backend))
    for path in list_stores(unbroken):
        other = broken / Path(path).relative_to(unbroken)
        assert tiny_dataset.read_every_array(path) == tiny_dataset.read_every_array(other)
        assert verify_store(open_store(other)) == []


def test_a_run_with_nothing_to_do_does_not_even_import_torch(tiny: Any) -> None:
    tiny.add_videos("v")
    assert tiny.extract(*CHOICES)[0] == 0
    assert count_done(tiny.cache) == 8
    finish(start_command(tiny, tiny.cache, "zarr", blocked="torch"))
    assert count_done(tiny.cache) == 8
