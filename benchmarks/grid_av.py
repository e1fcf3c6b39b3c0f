"""Runs grids on real clips: four spoken verbs in two visual domains.

    python -m benchmarks.grid_av --media FOLDER [--grid a-table2] [--workers 2] [--seeds 5] [--work runs/grid_av]
        [--recipe rna-test] [--preset quick] [--set part.field=value]

FOLDER holds `labels.csv` and the clips of `clean` and `shift` (a part of GRID, https://zenodo.org/records/3625687: the
verb of each sentence, the second domain made by flipping, turning the hue, less contrast and blur). A segment is the
verb with 0.4 s before and after it. Pictures go through I3D with Kinetics weights (`make weights`), in the trunk mode;
the sound through a ResNet-18 with random weights, of which layer4 is trained, because VGGSound's are not on any package
index. 64 train and 32 test segments: the table's intervals are wide. Without --grid it compares Stage 1's encoder with
the visual encoder alone. With `--recipe` both
encoders' pooled features are extracted by it first, into a cache of its own: what alignment's grids train on.
Writes the table to benchmarks/results/grid_av.md, or grid_av-GRID.md.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from echoshift.pipeline.cards import DatasetCard, MediaLayout, Shift, write_card
from echoshift.pipeline.manifest import write_manifest
from echoshift.pipeline.segments import Segment

HERE = Path(__file__).resolve().parent
MARGIN_S = 0.4
EXIT_SOME_FAILED = 3
SETTINGS = (
    "visual.encoder=i3d_rgb",
    "visual.mode=trunk",
    "visual.n_views=4",
    "visual.test_preset=zhang-stage1-val",
    "sound.encoder=resnet18_audio",
    "sound.weights=random:0",
    'sound.overrides=["audio.duration_s=1.0"]',
    "audio_classifier.lr=1e-3",
    "audio_classifier.n_epochs=20",
    "training.n_source=8",
    "training.n_target=8",
    "training.validate_every=0",
    "absent.n_absent=1",
    "export.train_preset=",
    "export.label_preset=zhang-stage1-val",
    "schedule.n_steps=400",
)


def write_dataset(media: Path, folder: Path) -> None:
    """Write card and manifest into a folder."""
    with (media / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    classes = tuple(sorted({row["verb"] for row in rows}))
    domains = tuple(sorted({row["domain"] for row in rows}))
    card = DatasetCard(
        name="grid_av",
        title="GRID, four verbs in two visual domains",
        task="single-label",
        metric="top1",
        classes=classes,
        domains=domains,
        shifts=tuple(Shift(source=(a,), target=b) for a in domains for b in domains if a != b),
        media=MediaLayout(rgb=("{video_id}",)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_card(folder / "grid_av.toml", card)
    segments = []
    for row in rows:
        video = row["file"].removesuffix(".mp4")
        start_s = max(0.0, float(row["verb_start_s"]) - MARGIN_S)
        stop_s = float(row["verb_stop_s"]) + MARGIN_S
        segments.append(Segment(video, video, start_s, stop_s, (row["verb"],), row["domain"], row["split"]))
    path = folder / "grid_av.csv"
    path.unlink(missing_ok=True)
    write_manifest(path, segments)


def run_echoshift(*arguments: str) -> int:
    """Run a command; return its exit code, 0, or 3 where some of its runs failed, and end with any other."""
    done = subprocess.run([sys.executable, "-c", "from echoshift.cli.app import main; main()", *arguments], check=False)
    if done.returncode not in (0, EXIT_SOME_FAILED):
        sys.exit(done.returncode)
    return done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/grid_av"), help="where stores, runs and the card lie")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--grid", default="")
    parser.add_argument("--recipe", default="", help="of `echoshift extract --preset`")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--set", action="append", default=[], help="part.field=value, over the settings above")
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    work: Path = arguments.work
    grid = arguments.grid or str(HERE / "grids" / "grid-av.toml")
    suffix = f"-{Path(arguments.grid).stem}" if arguments.grid else ""
    to: Path = arguments.to or HERE / "results" / f"grid_av{suffix}.md"
    write_dataset(arguments.media, work / "manifests")
    cache = work / (f"cache-{arguments.recipe}" if arguments.recipe else "cache")
    places = ["--media", str(arguments.media), "--manifests", str(work / "manifests"), "--cache", str(cache)]
    if arguments.recipe:
        run_echoshift(
            "extract", "grid_av", "--encoders", "i3d_rgb resnet18_audio", "--weights", "resnet18_audio=random:0",
            "--preset", arguments.recipe, *places, "--device", "cpu",
        )  # fmt: skip
    options = [
        "ablate", "grid_av", "--grid", grid, "--seeds", str(arguments.seeds), "--preset", arguments.preset,
        "--workers", str(arguments.workers), *places,
        "--runs", str(work / "runs"), "--to", str(work / "table.md"), "--device", "cpu",
    ]  # fmt: skip
    for setting in (*SETTINGS, *arguments.set):
        options += ["--set", setting]
    failed = run_echoshift(*options) == EXIT_SOME_FAILED
    text = (work / "table.md").read_text(encoding="utf-8")
    made = datetime.now(UTC).strftime("%Y-%m-%d")
    named = f" --grid {arguments.grid}" if arguments.grid else ""
    named += f" --recipe {arguments.recipe}" if arguments.recipe else ""
    named += f" --preset {arguments.preset}" if arguments.preset != "paper" else ""
    named += "".join(f" --set {setting}" for setting in arguments.set)
    counts = f"--seeds {arguments.seeds} --workers {arguments.workers}"
    command = f"python -m benchmarks.grid_av --media FOLDER{named} {counts}"
    to.write_text(f"# grid_av\n\n{made}, CPU, `{command}`\n\n{text}", encoding="utf-8")
    print(f"wrote {to}" + (", of which some runs failed" if failed else ""))


if __name__ == "__main__":
    main()
