"""Trains on a store that is several times larger than the memory allowed for it, and on the same store in memory.

    OMP_NUM_THREADS=1 python -m benchmarks.larger_than_memory [--mb 1024] [--times 5] [--epochs 2] [--folder FOLDER]

Random features of SlowFast's size, 5 clips of 2,304 float16. Half of the rows are the source, a quarter the target's
train split, a quarter its test split, drawn over the whole store, so that every shard holds all three. A linear
classifier is trained on 32 + 32 segments a step and predicts the test split after every epoch: it computes next to
nothing, so that reading shows as much as it ever will. Three ways, each in a process of its own: `reading` takes the
batches of one epoch and trains nothing, `stored` trains from the store, `memory` from features that are all in memory.

Memory is what the process has of its own (RssAnon: no pages of mapped files, which the system takes back as it needs
them), sampled every few milliseconds, less what it had when the store was open and its ids were known. Target: no more
than is allowed for `reading`; what the loop itself takes is the peak of `memory` less the features, and `stored` has
that on top. Reads are shards read, over the store's shards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echoshift.pipeline.specs import ClipSpec, FeatureSpec, FrameSpec, OutputSpec
from echoshift.pipeline.store.interface import ShardIndex
from echoshift.pipeline.store.layout import plan_rows_per_shard, plan_shards
from echoshift.pipeline.store.opening import create_store, open_store
from echoshift.train.cached.batches import Domain, Dropouts, FeatureBatch, StepInputs
from echoshift.train.cached.feature_bank import Rows, make_bank
from echoshift.train.cached.feature_rows import FeatureRows, read_visual
from echoshift.train.cached.larger_than_memory import count_row_bytes, open_rows
from echoshift.train.cached.training import Schedule, TrainingData, TrainingJob, train_jobs
from echoshift.train.watching import SilentWatcher

N_CLIPS, N_VISUAL, N_AUDIO, N_CLASSES, N_BATCH = 5, 2304, 8, 8, 32
MB = 2**20
SAMPLE_S = 0.004
WAYS = ("reading", "stored", "memory")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a way took; `n_reads` of shards, over all epochs and predictions. No loss where nothing was trained."""

    way: str
    allowed_mb: float
    peak_mb: float
    duration_s: float
    n_reads: int
    n_shards: int
    loss: float | None


class LinearMethod(nn.Module):
    """A linear classifier of the mean over clips."""

    loss_names = ("source", "target")

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(N_VISUAL, N_CLASSES)

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute cross-entropy on the source and, small, the target's logits squared."""
        assert step.target is not None, "there are rows of the target"
        of_source = F.cross_entropy(self._classify(step.source.inputs), step.source.labels)
        return torch.stack([of_source, 1e-3 * self._classify(step.target.inputs).square().mean()])

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict a softmax."""
        return self._classify(inputs).softmax(dim=-1)

    def _classify(self, inputs: FeatureBatch) -> Tensor:
        logits: Tensor = self.linear(inputs.visual["pooled"].mean(dim=1))
        return logits


class CountingStore:
    """A store that counts how often features are read."""

    def __init__(self, store: Any) -> None:
        self._store, self.n_reads = store, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_array(self, name: str, start_row: int = 0, stop_row: int | None = None) -> np.ndarray:
        """Read rows of any array."""
        self.n_reads += name.startswith("outputs/")
        values: np.ndarray = self._store.read_array(name, start_row, stop_row)
        return values


class MemorySampler(threading.Thread):
    """Keeps the largest RssAnon that it saw."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = read_own_bytes()
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample until it is stopped."""
        while not self._stopped.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, read_own_bytes())

    def stop(self) -> int:
        """Return the peak in bytes."""
        self._stopped.set()
        self.join()
        return self.peak_bytes


def read_own_bytes() -> int:
    """Read how many bytes of memory this process has of its own, without those of mapped files."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system doesn't say RssAnon in /proc/self/status; run the benchmark on Linux")


def make_store(path: Path, n_rows: int) -> None:
    """Fill a store with random features."""
    spec = FeatureSpec(
        encoder="random",
        weights="0" * 64,
        clip=ClipSpec(n_frames=32, n_clips=N_CLIPS),
        frame=FrameSpec(short_side=8, crop=8, mean=(0, 0, 0), std=(1, 1, 1)),
        outputs=(OutputSpec(name="pooled", shape=(N_VISUAL,)),),
        dtype="float16",
    )
    ids = [f"s{i:07d}" for i in range(n_rows)]
    n_rows_per_shard = plan_rows_per_shard(spec, n_rows, N_CLIPS)
    store = create_store(
        path,
        "random",
        spec,
        ids,
        n_clips=N_CLIPS,
        manifest_sha256="0",
        weights_source="none",
        n_rows_per_shard=n_rows_per_shard,
    )
    block = np.random.default_rng(0).standard_normal((n_rows_per_shard, N_CLIPS, N_VISUAL), np.float32)
    values = block.astype(np.float16)
    for shard in plan_shards(store.layout):
        n = shard.n_rows
        store.begin_shard(shard)
        store.write_outputs("pooled", shard.start_row, np.roll(values, shard.index, axis=0)[:n])
        index = ShardIndex(
            times=np.tile(np.array([0.0, 1.0]), (n, N_CLIPS, 1)),
            frames=np.zeros((n, N_CLIPS, 2), np.int64),
            n_valid=np.full(n, N_CLIPS, np.int32),
            digest=np.ones((n, 16), np.uint8),
            state=np.ones(n, np.uint8),
        )
        store.commit_shard(shard, index)


def make_job(rows: Rows, n_epochs: int) -> TrainingJob:
    """Make a run over `rows`, which predicts after every epoch."""
    n = len(rows)
    mixed = np.random.default_rng(1).permutation(n)
    source, target, test = (np.sort(part) for part in np.split(mixed, [n // 2, n // 2 + n // 4]))
    nothing = np.zeros(0, np.int64)
    data = TrainingData(
        train=rows,
        source=source,
        source_labels=source % N_CLASSES,
        source_domains=np.zeros(len(source), np.int64),
        target=target,
        pseudo_labels=np.full(len(target), -1),
        labelled=nothing,
        labelled_labels=nothing,
    )
    n_per_epoch = len(source) // N_BATCH
    schedule = Schedule(
        n_source=N_BATCH,
        n_target=N_BATCH,
        n_labelled=0,
        n_steps=n_epochs * n_per_epoch,
        optimiser="sgd",
        lr=1e-3,
        weight_decay=0.0,
        snapshots=tuple(n_per_epoch * (epoch + 1) for epoch in range(n_epochs - 1)),
    )
    predict: dict[str, tuple[Rows, np.ndarray, Domain]] = {"target_test": (rows, test, "target")}
    return TrainingJob("linear", LinearMethod, data, schedule, 0, predict, "linear")


def measure(way: str, path: Path, max_bytes: int, n_epochs: int) -> Outcome:
    """Train one way in this process."""
    cpu = torch.device("cpu")
    rng = np.random.default_rng(2)
    few = FeatureRows(
        tuple(str(i) for i in range(512)),
        {"pooled": torch.from_numpy(rng.standard_normal((512, 1, N_CLIPS, N_VISUAL), np.float32).astype(np.float16))},
        torch.zeros(512, N_AUDIO),
        torch.ones(512, dtype=torch.bool),
    )
    train_jobs([make_job(few, 2)], cpu, SilentWatcher())  # what torch and the loop need at all is there then
    del few
    store = CountingStore(open_store(path))
    ids = list(store.segment_ids)
    audio, has_audio = torch.zeros(len(ids), N_AUDIO), torch.ones(len(ids), dtype=torch.bool)
    base_bytes = read_own_bytes()
    sampler = MemorySampler()
    sampler.start()
    started = time.perf_counter()
    loss = None
    if way == "memory":
        rows: Rows = FeatureRows(tuple(ids), read_visual(store, ids), audio, has_audio)
    else:
        rows = open_rows(store, ids, audio, has_audio, max_bytes)
    if way == "reading":
        bank = make_bank([rows], cpu)
        order = torch.from_numpy(rows.shuffle(np.arange(len(rows)), 0, 0, 0))
        for part in order.split(2 * N_BATCH):
            bank.gather(part)
    else:
        [run] = train_jobs([make_job(rows, n_epochs)], cpu, SilentWatcher())
        loss = float(run.losses[-1].sum())
    duration_s = time.perf_counter() - started
    peak_mb = (sampler.stop() - base_bytes) / MB
    return Outcome(way, max_bytes / MB, peak_mb, duration_s, store.n_reads, store.layout.n_shards, loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1024, help="of features in the store")
    parser.add_argument("--times", type=float, default=5.0, help="how many times the allowed memory that is")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    max_bytes = int(args.mb * MB / args.times)
    if args.way:
        print(json.dumps(asdict(measure(args.way, args.folder / "features.zarr", max_bytes, args.epochs))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        path = folder / "features.zarr"
        if not path.exists():
            make_store(path, args.mb * MB // (N_CLIPS * N_VISUAL * 2))
        store = open_store(path)
        n_bytes = len(store.segment_ids) * count_row_bytes(store)
        n_shard_mb = store.layout.n_rows_per_shard * count_row_bytes(store) / MB
        print(f"{n_bytes / MB:.0f} MB in {store.layout.n_shards} shards of {n_shard_mb:.1f} MB, {args.epochs} epochs")
        print("| way | allowed MB | peak MB | peak / allowed | seconds | reads / shards | last loss |", flush=True)
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.larger_than_memory", "--way", way, "--folder", str(folder)]
            command += ["--mb", str(args.mb), "--times", str(args.times), "--epochs", str(args.epochs)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            o = Outcome(**json.loads(printed.splitlines()[-1]))
            cells = [way, "-", f"{o.peak_mb:.0f}", "-", f"{o.duration_s:.1f}", "-", "-"]
            if way != "memory":
                cells[1], cells[3] = f"{o.allowed_mb:.0f}", f"{o.peak_mb / o.allowed_mb:.2f}"
                cells[5] = f"{o.n_reads / o.n_shards:.1f}"
            if o.loss is not None:
                cells[6] = f"{o.loss:.4f}"
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
