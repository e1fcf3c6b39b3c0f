"""How each fenced block of shell is checked: run by default, run on the demo, or only parsed, and why."""

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

# Every option and argument is checked against the command line, `make` by `make -n`; nothing is run.
# A page without a heading means all of its blocks.
PARSED = {
    "docs/charadesego-actorshift.md": "needs the videos of CharadesEgo, ActorShift and Human-Animal-Cartoon",
    "docs/epic.md": "downloads EPIC and weights, needs EPIC's videos",
    "docs/extraction.md": "needs EPIC's videos",
    "docs/published-tables.md": "needs the videos of EPIC and CharadesEgo",
    "README.md#echoshift": "the slow tests begin with `make demo`; `make test` would run these tests",
    "README.md#echoshift-2": "needs the reader's own videos, and writes into the reader's shell",
    "docs/own-data.md#your-own-data": "needs the reader's own videos",
    "docs/report.md#the-installation-2": "writes into the reader's shell",
    "docs/scaling-out.md#a-dask-cluster": "needs several machines",
    "docs/scaling-out.md#slurm": "needs SLURM",
    "docs/scaling-out.md#slurm-2": "needs SLURM",
    "docs/scaling-out.md#stores-on-s3-and-other-urls": "needs a bucket",
    "docs/scaling-out.md#gpus": "needs GPUs",
    "docs/stage1.md#stage-1-the-audio-adaptive-encoder": "needs EPIC's videos",
}
