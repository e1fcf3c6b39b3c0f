"""Measures a step of Stage 2's training against a plain DataLoader loop.

    OMP_NUM_THREADS=2 python -m benchmarks.stage2_speed [--annotations FOLDER] [--rounds 9] [--steps 32] [--threads 2]
        [--device cpu] [--folder FOLDER] [--small 1] [--clock wall|cpu]

The preset `released` on D1 to D2 of epic_sized, 8 + 8 segments a batch, three ways in turn, `--steps` steps each: (a)
two DataLoaders, Adam as it comes; (b) rows looked up, Adam fused; (c) `train_run`. (a) and (b) are those of
plain_recogniser.py. Medians of the rounds in ms a step; ratios are medians of each round's own. (c) counts its second
half, so that what it does once, which is printed too, is not in it; (d) is the time from reading the files to the end
of its first step.
`--clock cpu` counts the process' seconds on a core, which other programs disturb less; it is for `--threads 1`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.epic_sized import EpicSized, make_epic_sized
from benchmarks.plain_recogniser import (
    LR,
    N_BATCH,
    WEIGHT_DECAY,
    PlainFeatures,
    PlainRecogniser,
    train_by_index,
    train_plainly,
)
from echoshift.train.features import StreamInputs, open_stream
from echoshift.train.loop import Schedule, TrainingData, TrainingJob, train_run
from echoshift.train.predictions import read_prediction_table
from echoshift.train.settings import resolve_config
from echoshift.train.stage2.config import Stage2Config
from echoshift.train.stage2.recogniser import build_recogniser

SOURCE, TARGET = "D1", "D2"
N_EPOCHS = 29
TARGET_RATIO, TARGET_START_S = 1.8, 5.0


Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


class TimingWatcher:
    """Notes when steps were done."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.done: list[tuple[int, float]] = []

    def start(self, what: str, n_total: int) -> None:
        """Note the beginning."""
        self.done = [(0, self.clock())]

    def advance(self, n: int = 1, note: str = "") -> None:
        """Note the time at which n more steps were done."""
        self.done.append((self.done[-1][0] + n, self.clock()))

    def describe(self, what: str) -> None:
        """Describe nothing."""

    def measure_last_half(self) -> float:
        """Return ms a step of those after the first half."""
        half = self.done[-1][0] // 2
        n, started = next((n, at) for n, at in self.done if n >= half)
        if n == self.done[-1][0]:
            raise SystemExit(f"{n} steps were done at once, so no half can be timed; give more --steps")
        return 1e3 * (self.done[-1][1] - started) / (self.done[-1][0] - n)

    def measure_whole(self) -> float:
        """Return the seconds from the beginning to the last step."""
        return self.done[-1][1] - self.done[0][1]


def read_shift(made: EpicSized, seed: int = 0) -> TrainingData:
    """Read what D1 to D2 trains on, as Stage 2 does."""
    source, target = (
        [s for s in made.segments if (s.domain, s.split) == (domain, "train")] for domain in (SOURCE, TARGET)
    )
    table_path = made.table(f"{SOURCE}-{TARGET}", seed)
    ids = [s.segment_id for s in (*source, *target)]
    max_bytes = Stage2Config().data.max_memory_mb * 2**20
    rows = open_stream(StreamInputs("", made.features, table_path), ids, max_bytes)
    table = read_prediction_table(table_path)
    nothing = np.zeros(0, np.int64)
    return TrainingData(
        train=rows,
        source=np.arange(len(source)),
        source_labels=np.array([made.card.class_index[s.labels[0]] for s in source]),
        source_domains=np.zeros(len(source), np.int64),
        target=np.arange(len(source), len(ids)),
        pseudo_labels=table.pseudo_labels[table.find([s.segment_id for s in target])],
        labelled=nothing,
        labelled_labels=nothing,
    )


def make_job(config: Stage2Config, data: TrainingData, n_classes: int, n_steps: int, seed: int) -> TrainingJob:
    """Make a run of the recogniser."""

    def build() -> nn.Module:
        rows = data.train
        return build_recogniser(config, rows.describe_shapes(), n_classes, rows.audio[data.source].mean(dim=0), seed)

    schedule = Schedule(
        N_BATCH, N_BATCH, N_BATCH, n_steps, "adam", LR, WEIGHT_DECAY, precision=config.schedule.precision
    )
    return TrainingJob(f"seed {seed}", build, data, schedule, seed)


def take_plain(data: TrainingData) -> tuple[PlainFeatures, PlainFeatures]:
    """Return the plain loops the same features, those of one domain after those of the other."""
    visual, audio = data.train.visual["pooled"][:, 0], data.train.audio
    n = len(data.source)
    return (
        PlainFeatures(visual[:n], audio[:n], torch.from_numpy(data.source_labels)),
        PlainFeatures(visual[n:], audio[n:], torch.from_numpy(data.pseudo_labels)),
    )


def measure_blocks(steps: Iterator[float], n_steps: int, clock: Clock) -> float:
    """Take n_steps steps, each of which waits for its loss; return ms a step."""
    started = clock()
    for _ in itertools.islice(steps, n_steps):
        pass
    return 1e3 * (clock() - started) / n_steps


def compare_loops(make: Callable[[int, int], TrainingJob], n_classes: int, args: argparse.Namespace) -> None:
    """Print (a), (b) and (c)."""
    device, clock = torch.device(args.device), CLOCKS[args.clock]
    data = make(1, 0).data
    torch.manual_seed(0)
    sizes = (data.train.visual["pooled"].shape[-1], data.train.audio.shape[1], n_classes)
    n_ours = sum(p.numel() for p in make(1, 0).build().parameters() if p.requires_grad)
    models = [PlainRecogniser(*sizes).to(device).train() for _ in range(2)]
    n_theirs = sum(p.numel() for p in models[0].parameters())
    print(f"trained numbers: {n_ours:,} (c), {n_theirs:,} (a, b)")
    plain = train_plainly(models[0], *take_plain(data), device)
    looked_up = train_by_index(models[1], *take_plain(data), device)
    times: dict[str, list[float]] = {"a": [], "b": [], "c": [], "once": []}
    measure_blocks(plain, 8, clock)
    measure_blocks(looked_up, 8, clock)
    for _ in range(args.rounds):
        times["a"].append(measure_blocks(plain, args.steps, clock))
        times["b"].append(measure_blocks(looked_up, args.steps, clock))
        watcher = TimingWatcher(clock)
        train_run(make(2 * args.steps, 0), device, watcher)
        times["c"].append(watcher.measure_last_half())
        times["once"].append(watcher.measure_whole() - 2e-3 * args.steps * times["c"][-1])
    medians = {name: statistics.median(values) for name, values in times.items()}
    n_steps = N_EPOCHS * (len(data.source) // N_BATCH)
    for name, what in (("a", "two DataLoaders, Adam"), ("b", "rows looked up, fused Adam"), ("c", "train_run")):
        spread = f"{min(times[name]):.1f} to {max(times[name]):.1f}"
        run_s = medians[name] * n_steps / 1e3
        print(f"({name}) {what:<28} {medians[name]:7.2f} ms a step ({spread}); {n_steps} steps {run_s:.0f} s")
    print(f"(c) does once, beside its steps: {medians['once']:.2f} s")
    for slow, fast in (("a", "b"), ("a", "c"), ("b", "c")):
        ratios = [s / f for s, f in zip(times[slow], times[fast], strict=True)]
        aim = f", target {TARGET_RATIO}" if (slow, fast) == ("a", "c") else ""
        print(f"{slow} / {fast}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}){aim}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--small", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        made = make_epic_sized(args.folder or Path(scratch), args.annotations, small=args.small)
        print(
            f"load {os.getloadavg()[0]:.1f}, {args.threads} threads, {args.device}, {args.clock} clock, "
            f"torch {torch.__version__}"
        )
        started = time.perf_counter()
        config = resolve_config(Stage2Config, made.card, "released")
        data = read_shift(made)

        def make(n_steps: int, seed: int) -> TrainingJob:
            return make_job(config, data, len(made.card.classes), n_steps, seed)

        train_run(make(1, 0), torch.device(args.device), TimingWatcher(time.perf_counter))
        start_s = time.perf_counter() - started
        print(f"(d) from reading to the end of the first step: {start_s:.2f} s, target {TARGET_START_S}")
        compare_loops(make, len(made.card.classes), args)


if __name__ == "__main__":
    main()
