"""Is `echoshift demo`: generates the synthetic demo data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cards import MANIFESTS_DIR

app = typer.Typer(no_args_is_help=True, help="Generate the synthetic demo data set.")


@app.command()
def generate(
    to: Annotated[Path, typer.Option(help="Where the videos are written.")] = MANIFESTS_DIR.parent / "demo",
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    manifests: Annotated[
        Path, typer.Option(help="Where the manifest is written.", envvar="ECHOSHIFT_MANIFESTS")
    ] = MANIFESTS_DIR,
) -> None:
    """Write the demo's videos and its manifest; does nothing when they are there already."""
    from extract.commands.terminal import show_progress
    from extract.demo.generation import generate_demo
    from extract.demo.planning import plan_demo, plan_segments
    from pipeline.manifest_csv import locate_manifest, write_manifest

    plans = plan_demo(seed)
    mark = to / "generated.txt"
    path = locate_manifest("demo", manifests)
    if (
        mark.exists()
        and mark.read_text() == f"seed {seed}\n"
        and all((to / p.world.name / f"{p.video_id}.mp4").exists() for p in plans)
    ):
        segments = [segment for plan in plans for segment in plan_segments(plan)]
    else:
        mark.unlink(missing_ok=True)
        with show_progress("videos") as progress:
            progress.start("generating", len(plans))
            segments = generate_demo(to, seed, progress=lambda _n_written, _n_total: progress.advance())
        mark.write_text(f"seed {seed}\n")
    write_manifest(path, segments)
    typer.echo(f"{len(segments)} segments of synthetic video in {to}, listed in {path}")
