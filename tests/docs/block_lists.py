"""Lists how each fenced block of shell is checked: run by default, run on the demo, or only parsed, and why."""

from __future__ import annotations

# Run by the default tests, in this process, on a data set of seconds that is called demo.
CHEAP = (
    "docs/own-data.md#your-own-data-2",
    "docs/store.md#commands",
)

# Run by the slow tests as they stand, one after the other in a checkout where `make demo` has been run.
ON_THE_DEMO = (
    "docs/store.md#commands",
    "docs/stage1.md#stage-1-the-audio-adaptive-encoder-2",
    "docs/stage2.md#stage-2-the-audio-infused-recogniser",
    "docs/alignment.md#alignment-relative-norms-adversaries-discrepancies",
    "docs/grids.md#grids-and-tables",
    "docs/scaling-out.md#worker-processes",
    "docs/report.md#the-report",
    "docs/report.md#one-segment",
    "docs/report.md#plots",
    "docs/report.md#the-installation",
    "docs/adding-an-encoder.md#adding-an-encoder",
    "docs/adding-a-method.md#adding-a-method",
)

_NO_EPIC = "needs EPIC's videos"
_NO_CHARADES = "needs the videos of CharadesEgo"
_OWN = "needs the reader's own videos"

# Every option and argument is checked against the command line, `make` by `make -n`; nothing is run.
PARSED = {
    "README.md#echoshift": "the slow tests begin with `make demo`; `make test` would run these tests",
    "README.md#echoshift-2": f"{_OWN}, and writes into the reader's shell",
    "docs/charadesego-actorshift.md#charadesego": _NO_CHARADES,
    "docs/charadesego-actorshift.md#actorshift": "needs ActorShift's clips",
    "docs/charadesego-actorshift.md#actorshift-2": "needs the videos of Human-Animal-Cartoon",
    "docs/epic.md#1-media-and-annotations": "downloads EPIC",
    "docs/epic.md#1-media-and-annotations-2": "downloads EPIC",
    "docs/epic.md#2-manifest-and-weights": "downloads weights",
    "docs/epic.md#3-extraction": _NO_EPIC,
    "docs/epic.md#4-stage-1-and-stage-2": _NO_EPIC,
    "docs/epic.md#5-alignment": _NO_EPIC,
    "docs/extraction.md#extraction": _NO_EPIC,
    "docs/own-data.md#your-own-data": _OWN,
    "docs/published-tables.md#zhang-et-al-2022-table-2": _NO_EPIC,
    "docs/published-tables.md#zhang-et-al-2022-table-3": _NO_CHARADES,
    "docs/published-tables.md#zhang-et-al-2022-section-5-1-no-sound-at-test": _NO_EPIC,
    "docs/published-tables.md#zhang-et-al-2022-table-4": _NO_EPIC,
    "docs/published-tables.md#zhang-et-al-2022-table-4-2": _NO_EPIC,
    "docs/published-tables.md#zhang-et-al-2022-figures-4-and-5": _NO_EPIC,
    "docs/published-tables.md#planamente-et-al-2021-the-features": _NO_EPIC,
    "docs/published-tables.md#planamente-et-al-2021-the-features-2": _NO_EPIC,
    "docs/published-tables.md#planamente-et-al-2021-table-1b": _NO_EPIC,
    "docs/published-tables.md#planamente-et-al-2021-table-2": _NO_EPIC,
    "docs/published-tables.md#planamente-et-al-2021-table-3": _NO_EPIC,
    "docs/published-tables.md#planamente-et-al-2021-figure-5": _NO_EPIC,
    "docs/report.md#the-installation-2": "writes into the reader's shell",
    "docs/scaling-out.md#a-dask-cluster": "needs several machines",
    "docs/scaling-out.md#slurm": "needs SLURM",
    "docs/scaling-out.md#slurm-2": "needs SLURM",
    "docs/scaling-out.md#stores-on-s3-and-other-urls": "needs a bucket",
    "docs/scaling-out.md#gpus": "needs GPUs",
    "docs/stage1.md#stage-1-the-audio-adaptive-encoder": _NO_EPIC,
}
