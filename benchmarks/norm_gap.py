"""Trains on generated features whose modality norms differ by 10 x; shows what becomes of norms and accuracy.

    python -m benchmarks.norm_gap [--methods "source_only rna hna"] [--settings "dg uda"] [--gap 10] [--seeds 3]
        [--steps 9000] [--width 1024] [--lr 0.01] [--weight 1] [--curves FILE.csv] [--picture FILE.png]

Targets: RNA's ratio of mean norms within 5 % of 1, and its accuracy on the target no worse than source-only's.

A segment's feature is the positive part of 1 plus its class' mean, its domain's offset and noise; pictures say more of
the class in the source than in the target, sound the same in both. Both directions are run: `visual` and `audio` say
which modality has the larger norm. A run is that of the paper's schedule, shortened in proportion with --steps; --lr is
its learning rate until the drop to a tenth. Dead units are those that are the same for every segment of the source.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from echoshift.train.alignment.config import AlignmentConfig, AlignmentScheduleConfig
from echoshift.train.alignment.method import build_method, compute_mean_norm
from echoshift.train.alignment.run import measure_dead_units, plan_schedule
from echoshift.train.features import FeatureBatch, FeatureRows, FeatureShapes
from echoshift.train.loop import (
    Domain,
    Dropouts,
    StepInputs,
    TrainedRun,
    TrainingData,
    TrainingJob,
    predict_rows,
    train_run,
)
from echoshift.train.watching import SilentWatcher

N_CLASSES, N_CLIPS, N_VISUAL, N_AUDIO, N_TRAIN, N_TEST = 8, 5, 256, 128, 1200, 800
P_SILENT, SMALLER_NORM = 0.05, 4.0


@dataclass(frozen=True, slots=True)
class NormGap:
    """What one run came to: the target's accuracies, |f^v| / |f^a| in both domains, each stream's dead units."""

    last: float
    mean_last: float
    in_source: float
    in_target: float
    dead_visual: float
    dead_audio: float


class Measured(nn.Module):
    """A method that also reports its source's mean norms, as terms of the loss without a gradient."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.method = method
        self.loss_names = (*method.loss_names, "norm visual", "norm audio")

    def losses(self, step: StepInputs, dropouts: Dropouts) -> Tensor:
        """Compute the method's terms, and the norms."""
        with torch.no_grad():
            norms = measure_norms(self.method, step.source.inputs, "source")
        return torch.cat([self.method.losses(step, dropouts), norms])

    def predict(self, inputs: FeatureBatch, domain: Domain) -> Tensor:
        """Predict as the method does."""
        found: Tensor = self.method.predict(inputs, domain)
        return found


def measure_norms(method: Any, inputs: FeatureBatch, domain: Domain) -> Tensor:
    """Measure the mean norms of f^v and, of sounding segments, of f^a, float32 [2]."""
    visual, audio, heard = method.streams.encode(inputs, domain)
    return torch.stack([compute_mean_norm(visual, torch.ones_like(heard)), compute_mean_norm(audio, heard)])


def make_features(larger: str, gap: float, seed: int) -> tuple[FeatureRows, np.ndarray]:
    """Make rows of source train, target train and target test, and their classes, int64 [n]."""
    rng = np.random.default_rng(seed)
    n = 2 * N_TRAIN + N_TEST
    labels = rng.integers(0, N_CLASSES, n)
    in_target = np.arange(n) >= N_TRAIN
    means = rng.standard_normal((N_CLASSES, N_VISUAL)), rng.standard_normal((N_CLASSES, N_AUDIO))
    elsewhere = rng.standard_normal((N_CLASSES, N_VISUAL))
    offsets = rng.standard_normal((2, N_VISUAL))
    of_class = np.where(in_target[:, None], 0.5 * means[0][labels] + 0.5 * elsewhere[labels], means[0][labels])
    of_segment = 0.25 * of_class + 0.3 * offsets[in_target.astype(int)] + rng.standard_normal((n, N_VISUAL))
    visual = np.maximum(of_segment[:, None] + 0.5 * rng.standard_normal((n, N_CLIPS, N_VISUAL)) + 1, 0)
    audio = np.maximum(0.2 * means[1][labels] + rng.standard_normal((n, N_AUDIO)) + 1, 0)
    has_audio = rng.random(n) >= P_SILENT
    norms = {"visual": SMALLER_NORM, "audio": SMALLER_NORM, larger: SMALLER_NORM * gap}
    visual *= norms["visual"] / np.linalg.norm(visual, axis=-1).mean()
    audio *= norms["audio"] / np.linalg.norm(audio, axis=-1).mean()
    audio[~has_audio] = 0
    rows = FeatureRows(
        tuple(f"s{i}" for i in range(n)),
        {"pooled": torch.from_numpy(visual[:, None].astype(np.float16))},
        torch.from_numpy(audio.astype(np.float32)),
        torch.from_numpy(has_audio),
    )
    return rows, labels


def plan_job(
    config: AlignmentConfig, schedule: AlignmentScheduleConfig, rows: FeatureRows, labels: np.ndarray, seed: int
) -> TrainingJob:
    """Make one run of the shared loop."""
    target = np.arange(N_TRAIN, 2 * N_TRAIN) if config.setting == "uda" else np.zeros(0, dtype=np.int64)
    shapes = FeatureShapes({"pooled": (N_VISUAL,)}, N_AUDIO)
    data = TrainingData(
        train=rows,
        source=np.arange(N_TRAIN),
        source_labels=labels[:N_TRAIN],
        source_domains=np.zeros(N_TRAIN, dtype=np.int64),
        target=target,
        pseudo_labels=np.full(len(target), -1),
        labelled=np.zeros(0, dtype=np.int64),
        labelled_labels=np.zeros(0, dtype=np.int64),
        one_clip=True,
    )
    return TrainingJob(
        title=f"{config.method}, seed {seed}",
        build=lambda: Measured(build_method(config, shapes, N_CLASSES, seed)),
        data=data,
        schedule=plan_schedule(schedule, has_target=len(target) > 0),
        seed=seed,
    )


def judge(job: TrainingJob, run: TrainedRun, labels: np.ndarray) -> NormGap:
    """Score a run, and measure its norms over all clips, one by one."""
    measured: Any = job.build().eval()
    rows, ratios = job.data.train, []
    tested, predicted = np.arange(2 * N_TRAIN, len(rows)), []
    for state in (*run.snapshots, run.state):
        measured.load_state_dict(state)
        predicted.append(predict_rows(measured, rows, tested, "target", torch.device("cpu"), one_clip=True))
    right = np.stack(predicted).argmax(axis=-1) == labels[2 * N_TRAIN :]
    places: tuple[tuple[slice, Domain], ...] = ((slice(N_TRAIN), "source"), (slice(2 * N_TRAIN, None), "target"))
    for part, domain in places:
        norms = []
        for clip in range(N_CLIPS):
            visual = rows.visual["pooled"][part, 0, clip : clip + 1].float()
            with torch.no_grad():
                batch = FeatureBatch({"pooled": visual}, rows.audio[part], rows.has_audio[part])
                norms.append(measure_norms(measured.eval().method, batch, domain))
        of_visual, of_audio = torch.stack(norms).mean(dim=0).tolist()
        ratios.append(of_visual / of_audio)
    dead = measure_dead_units(measured.method, rows, np.arange(N_TRAIN), one_clip=True)
    return NormGap(float(right[-1].mean()), float(right.mean()), *ratios, dead["frames"], dead["audio"])


def write_curves(curves: dict[str, np.ndarray], path: Path) -> None:
    """Write the first seed's norms by epoch of each run, [n_epochs, 2], as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "epoch", "norm_visual", "norm_audio"])
        for title, norms in curves.items():
            writer.writerows([title, epoch, *map("{:.4f}".format, pair)] for epoch, pair in enumerate(norms.tolist()))


def draw_curves(curves: dict[str, np.ndarray], path: Path) -> None:
    """Draw the first seed's norms by epoch: a panel a setting and direction, a line a method and modality."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys(" ".join(title.split()[:2]) for title in curves))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.2), sharey=True, squeeze=False)
    for panel, ax in zip(panels, axes[0], strict=True):
        runs = {title.split()[2]: norms for title, norms in curves.items() if title.startswith(f"{panel} ")}
        for i, (method, norms) in enumerate(runs.items()):
            for norm, modality, style in zip(norms.T, ("frames", "audio"), ("-", "--"), strict=True):
                ax.plot(np.arange(len(norm)), norm, style, color=f"C{i}", label=f"{method}, {modality}")
        setting, larger = panel.split()
        ax.set(title=f"{setting}: {larger} features larger", xlabel="epoch", yscale="log")
    axes[0, 0].set_ylabel("mean feature norm, source")
    axes[0, -1].legend(fontsize="small", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def shorten(schedule: AlignmentScheduleConfig, n_steps: int) -> AlignmentScheduleConfig:
    """Shorten a schedule in proportion."""
    share = n_steps / schedule.n_steps
    changes = {
        "n_steps": n_steps,
        "lr_drop_step": round(schedule.lr_drop_step * share),
        "checkpoint_every": max(1, round(schedule.checkpoint_every * share)),
    }
    return AlignmentScheduleConfig.model_validate({**schedule.model_dump(), **changes})


def main() -> None:
    """Run what the command line asks for, and print a line a setting, direction and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="source_only rna hna")
    parser.add_argument("--settings", default="dg uda")
    parser.add_argument("--larger", default="visual audio")
    parser.add_argument("--gap", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--lr", type=float, help="in place of the paper's 0.01; the drop is to a tenth of it")
    parser.add_argument("--weight", type=float, help="of RNA, in place of the default")
    parser.add_argument("--curves", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    schedule = shorten(AlignmentScheduleConfig(), options.steps)
    if options.lr is not None:
        schedule = schedule.model_copy(update={"lr": options.lr, "dropped_lr": options.lr / 10})
    curves: dict[str, np.ndarray] = {}
    print("setting larger  method         last  mean_last  |f^v|/|f^a| source | target | dead v | dead a (each seed)")
    for setting in options.settings.split():
        for larger in options.larger.split():
            for method in options.methods.split():
                config = AlignmentConfig.model_validate(
                    {"method": method, "setting": setting, "network": {"width": options.width}}
                )
                if options.weight is not None:
                    config = config.model_copy(update={"rna": config.rna.model_copy(update={"weight": options.weight})})
                made = [make_features(larger, options.gap, seed) for seed in range(options.seeds)]
                jobs = [plan_job(config, schedule, rows, labels, seed) for seed, (rows, labels) in enumerate(made)]
                runs = [train_run(job, device, SilentWatcher()) for job in jobs]
                found = [judge(job, run, labels) for job, run, (_, labels) in zip(jobs, runs, made, strict=True)]
                in_source, in_target, dead_visual, dead_audio = (
                    " ".join(f"{getattr(f, place):6.3f}" for f in found)
                    for place in ("in_source", "in_target", "dead_visual", "dead_audio")
                )
                last, mean_last = (100 * np.mean([getattr(f, k) for f in found]) for k in ("last", "mean_last"))
                print(
                    f"{setting:7} {larger:7} {method:13} {last:5.2f}  {mean_last:9.2f}  {in_source} | {in_target} | "
                    f"{dead_visual} | {dead_audio}",
                    flush=True,
                )
                curves[f"{setting} {larger} {method}"] = runs[0].losses[:, -2:]
    if options.curves is not None:
        write_curves(curves, options.curves)
    if options.picture is not None:
        draw_curves(curves, options.picture)


if __name__ == "__main__":
    main()
