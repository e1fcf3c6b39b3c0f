"""Kills workers, schedulers and drivers of real runs, and interrupts them: stores verify, no process is left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest

from echoshift.pipeline.cards import write_card
from echoshift.pipeline.errors import EchoshiftError
from echoshift.pipeline.manifest import write_manifest
from echoshift.pipeline.segments import Segment
from echoshift.pipeline.store.failures import read_failures
from echoshift.pipeline.store.layout import DONE, FAILED, PENDING
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.pipeline.store.verify import verify_store

N_VIDEOS, N_EACH, N_ROWS_PER_SHARD = 3, 28, 4
N_ROWS = N_VIDEOS * N_EACH
COMMAND = "from echoshift.cli.app import main; main()"
INTERRUPTED = "interrupted; what is committed is kept, the same command goes on from there"

# Kills the worker that is given rows 8 to 12, as the kernel does when memory runs out; workers import this by its name.
DEADLY = """
import os, signal
import echoshift.extract.run, echoshift.extract.workers
from pathlib import Path

def compute(topic, plan, work):
    if work.task.shard.index == 2:
        with Path(os.environ["DEATHS"]).open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return echoshift.extract.workers.compute_shard_on_worker(topic, plan, work)

echoshift.extract.run.compute_shard_on_worker = compute
"""


@dataclass
class Run:
    process: subprocess.Popen[str]
    cache: Path

    def count(self, state: int = DONE) -> int:
        return sum(int((open_store(path).read_array("state") == state).sum()) for path in list_stores(self.cache))

    def wait_for_rows(self, n_rows: int) -> None:
        deadline = time.monotonic() + 150
        while self.count() < n_rows:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let the process stand still, with whatever it holds."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def wait_for_words(self, words: str) -> None:
        assert self.process.stderr is not None
        said = ""
        while words not in said:
            line = self.process.stderr.readline()
            said += line
            assert line, f"it ended without saying {words!r}: {said}"

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        return [child for child in self.children() if "spawn_main" in " ".join(child.cmdline())]

    def finish(self) -> tuple[int, str]:
        """Wait for the end; return exit code and what was said as errors."""
        _, errors = self.process.communicate(timeout=240)
        progress = ("extracting: ", "looking ", "starting ")
        lines = [line for line in errors.splitlines(keepends=True) if not line.startswith(progress)]
        return self.process.returncode, "".join(lines).lstrip()


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def folder(tiny_dataset: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    for i in range(N_VIDEOS):
        tiny_dataset.write_video(root / f"media/v{i}.mp4", seed=i, sound="none")
    segments = [
        Segment(f"v{i}-{j:02}", f"v{i}", 0.04 * j, 0.04 * j + 1.1, ("a",), "d", "train")
        for i in range(N_VIDEOS)
        for j in range(N_EACH)
    ]
    write_card(root / "tiny.toml", tiny_dataset.CARD)
    write_manifest(root / "tiny.csv", segments)
    return root


@pytest.fixture(scope="module")
def media(folder: Path) -> Path:
    assert start_run(folder, folder / "unbroken").finish()[0] == 0
    return folder


def heed_interrupts() -> None:
    """Undo what a background shell does to its jobs: they inherit that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_run(root: Path, cache: Path, *options: str, code: str = COMMAND, **environment: str) -> Run:
    arguments = ["extract", "tiny", "--media", str(root / "media"), "--cache", str(cache), "--manifests", str(root)]
    arguments += ["--encoders", "slowfast_demo", "--device", "cpu", "--set", "clip.n_clips=1"]
    arguments += ["--rows-per-shard", str(N_ROWS_PER_SHARD), *options]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
        env={**os.environ, **environment},
    )
    return Run(process, cache)


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Start runs into a cache of the test's own, and end what the test leaves behind."""
    runs = []

    def start(*options: str, code: str = COMMAND, **environment: str) -> Run:
        runs.append(start_run(folder, tmp_path / "cache", *options, code=code, **environment))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            for process in [*run.children(), run.process]:
                process.kill()
            run.process.communicate()


def assert_whole(media: Path, cache: Path) -> None:
    (expected_path,) = list_stores(media / "unbroken")
    (path,) = list_stores(cache)
    expected, store = open_store(expected_path), open_store(path)
    assert verify_store(store) == []
    for name in ("outputs/pooled", "times", "frames", "n_valid", "digest", "state", "segment_id"):
        assert store.read_array(name).tobytes() == expected.read_array(name).tobytes(), name


def assert_all_gone(processes: list[psutil.Process], timeout_s: float = 15) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert alive == []


def verify_all(cache: Path) -> list[object]:
    return [fault for path in list_stores(cache) for fault in verify_store(open_store(path))]


def test_a_killed_worker_costs_nothing_but_time(media: Path, start: Start) -> None:
    run = start("--workers", "2")
    run.wait_for_rows(2 * N_ROWS_PER_SHARD)
    children = run.children()
    run.workers()[0].kill()
    assert run.finish() == (0, "")
    assert_whole(media, run.cache)
    assert_all_gone(children)


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_is_recorded_and_the_run_goes_on(media, start, tmp_path):
    (tmp_path / "deadly.py").write_text(DEADLY)
    run = start(
        *("--workers", "2"),
        code=f"import deadly; {COMMAND}",
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        DEATHS=str(tmp_path / "deaths"),
    )
    code, errors = run.finish()
    assert code == 3, errors
    assert "tried again, one at a time" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "deaths").read_text() == "xxxx", "twice among others, twice alone"
    (path,) = list_stores(run.cache)
    store = open_store(path)
    assert np.flatnonzero(store.read_array("state") == FAILED).tolist() == [8, 9, 10, 11]
    assert run.count() == N_ROWS - 4
    failures = read_failures(path)
    assert sorted(failures) == [f"v0-{j:02}" for j in range(8, 12)]
    assert {(f.exception, f.retryable) for f in failures.values()} == {("WorkerDied", True)}
    assert all("--retry-failed" in f.reason and "rows 8 to 12" in f.reason for f in failures.values())
    assert verify_store(store) == []
    assert start("--retry-failed").finish()[0] == 0
    assert_whole(media, run.cache)
    assert read_failures(path) == {}


@pytest.mark.slow
def test_a_killed_driver_takes_its_workers_along_and_the_next_run_ends_in_the_same_bytes(media, start):
    run = start("--workers", "2")
    run.wait_for_rows(2 * N_ROWS_PER_SHARD)
    children = run.children()
    assert len(run.workers()) == 2
    run.process.kill()
    run.process.communicate()
    assert_all_gone(children)
    assert verify_all(run.cache) == []
    n_before = run.count()
    assert n_before < N_ROWS
    assert start().finish() == (0, "")
    assert_whole(media, run.cache)


@pytest.mark.parametrize(
    ("options", "send"),
    [
        # A terminal's Ctrl-C reaches the workers too.
        (("--workers", "2"), lambda process: os.killpg(process.pid, signal.SIGINT)),
        pytest.param((), lambda process: process.send_signal(signal.SIGINT), marks=pytest.mark.slow),
        pytest.param(("--workers", "2"), lambda process: process.send_signal(signal.SIGTERM), marks=pytest.mark.slow),
    ],
)
def test_interrupts_end_in_one_line_and_leave_no_process_behind(start: Start, options, send) -> None:
    run = start(*options)
    run.wait_for_rows(2 * N_ROWS_PER_SHARD)
    children = run.children()
    send(run.process)
    code, errors = run.finish()
    assert (code, errors.strip()) == (130, INTERRUPTED)
    assert_all_gone(children)
    assert run.count() >= 2 * N_ROWS_PER_SHARD
    assert verify_all(run.cache) == []


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a Dask scheduler with two workers, as people do on several machines."""
    file = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-m", "dask"]
    processes = [
        subprocess.Popen([*dask, "scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)], **quiet)
    ]
    while not file.exists():
        assert processes[0].poll() is None
        time.sleep(0.05)
    processes += [
        subprocess.Popen(
            [*dask, "worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-nanny", "--no-dashboard"], **quiet
        )
        for _ in range(2)
    ]
    yield str(file), processes[0]
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_killed_scheduler_ends_the_run_in_one_line(media, start, scheduler):
    run = start("--scheduler", scheduler[0])
    run.wait_for_rows(2 * N_ROWS_PER_SHARD)
    scheduler[1].kill()
    code, errors = run.finish()
    assert code == 2, errors
    assert errors.startswith("error: the Dask scheduler is gone")
    assert errors.count("\n") == 1, errors
    assert verify_all(run.cache) == []
    n_before = run.count()
    assert 2 * N_ROWS_PER_SHARD <= n_before < N_ROWS
    assert start().finish() == (0, "")
    assert run.count(PENDING) == 0
    assert_whole(media, run.cache)


@pytest.mark.slow
def test_a_run_on_a_scheduler_ends_in_the_same_bytes_and_leaves_it_running(media, start, scheduler):
    run = start("--scheduler", scheduler[0])
    assert run.finish() == (0, "")
    assert_whole(media, run.cache)
    assert scheduler[1].poll() is None, "it was left running"


@pytest.mark.slow
def test_workers_that_cannot_see_the_store_are_one_error(start: Start, tmp_path: Path) -> None:
    blind = "import echoshift.pipeline.store.open as o, deadly2"
    (tmp_path / "deadly2.py").write_text(
        "import multiprocessing, echoshift.extract.workers\nfrom echoshift.pipeline.errors import StoreError\n"
        "def refuse(path):\n    raise StoreError(f'no feature store at {path}')\n"
        "def compute(topic, plan, work):\n    echoshift.extract.workers.open_store = refuse\n"
        "    return echoshift.extract.workers.compute_shard_on_worker(topic, plan, work)\n"
        "import echoshift.extract.run\nechoshift.extract.run.compute_shard_on_worker = compute\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code, errors = start("--workers", "2", code=f"{blind}; {COMMAND}", PYTHONPATH=path).finish()
    assert code == 2
    assert "can't open the store" in errors and "mount the cache" in errors
    assert errors.count("\n") == 1, errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", "2", "--backend", "hdf5"), "HDF5 is local and has a single writer"),
        (("--scheduler", "nowhere.json"), "no scheduler file nowhere.json"),
        (("--scheduler", "x", "--workers", "2"), "--scheduler uses the workers that are there"),
        (("--slurm",), "--slurm needs --workers"),
        (("--slurm-option", "cores=2"), "--slurm-option goes with --slurm"),
    ],
)
def test_impossible_options_are_one_error(folder: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    from echoshift.cli.app import app

    arguments = ["extract", "tiny", "--media", str(folder / "media"), "--manifests", str(folder), "--device", "cpu"]
    with pytest.raises(EchoshiftError, match=message):
        app([*arguments, "--cache", str(tmp_path), "--encoders", "slowfast_demo", *options], standalone_mode=False)


@pytest.mark.slow
def test_slurm_jobs_compute_the_same_bytes(media: Path, tmp_path: Path, start: Start) -> None:
    """A stand-in for sbatch runs the job's script at once, so that all but SLURM's own queue is tried."""
    pytest.importorskip("dask_jobqueue", reason="needs the extra `slurm`")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(
        f'#!/bin/bash\ncp "$1" {tmp_path}/job.sh\nsetsid bash {tmp_path}/job.sh >{tmp_path}/job.log 2>&1 &\n'
        f'echo $! >> {tmp_path}/pids\necho "Submitted batch job $!"\n'
    )
    (tmp_path / "bin/scancel").write_text('#!/bin/bash\nfor job in "$@"; do kill -TERM -- "-$job" 2>/dev/null; done\n')
    for name in ("sbatch", "scancel"):
        (tmp_path / "bin" / name).chmod(0o755)
    options = ["--slurm", "--workers", "1", "--slurm-option", "cores=1", "--slurm-option", "memory=4GB"]
    options += ["--slurm-option", "interface=lo", "--slurm-option", "job_extra_directives=['--partition=gpu']"]
    run = start(*options, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    code, errors = run.finish()
    assert code == 0, errors
    assert_whole(media, tmp_path / "cache")
    script = (tmp_path / "job.sh").read_text()
    assert "#SBATCH --partition=gpu" in script and "--nthreads 1" in script
    jobs = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert_all_gone([psutil.Process(pid) for pid in jobs if psutil.pid_exists(pid)])


def test_a_second_run_waits_for_the_first_and_finds_everything_done(media: Path, tmp_path: Path, start: Start) -> None:
    first = start()
    first.wait_for_rows(N_ROWS_PER_SHARD)
    with first.stopped():
        refused = start()
        second = start("--wait", "120")
        code, errors = refused.finish()
        assert code == 2
        assert "is being written by" in errors and str(first.process.pid) in errors and "--wait" in errors
        second.wait_for_words(f"waiting for process {first.process.pid} of")
    assert first.finish()[0] == 0
    code, errors = second.finish()
    assert code == 0, errors
    assert_whole(media, tmp_path / "cache")
    runs = [json.loads(line) for line in next((tmp_path / "cache/tiny").glob("*.runs.jsonl")).read_text().splitlines()]
    assert len(runs) == 1, "the second run computed nothing"
