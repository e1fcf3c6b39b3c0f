"""`echoshift demo`: generates the synthetic demo data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echoshift.cli.terminal import JsonOption, QuietOption, print_json
from echoshift.pipeline.places import MANIFESTS_DIR

app = typer.Typer(no_args_is_help=True, help="Generate the synthetic demo data set.")


@app.command()
def generate(
    to: Annotated[Path, typer.Option(help="Where the videos are written.")] = MANIFESTS_DIR.parent / "demo",
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    manifests: Annotated[
        Path, typer.Option(help="Where the manifest is written.", envvar="ECHOSHIFT_MANIFESTS")
    ] = MANIFESTS_DIR,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the demo's videos and its manifest; does nothing when they are there already."""
    from echoshift.cli.terminal import show_progress
    from echoshift.extract.demo.generating import generate_demo
    from echoshift.pipeline.manifest import locate_manifest, write_manifest

    with show_progress("videos", quiet=quiet) as progress:

        def show(n_written: int, n_total: int) -> None:
            if n_written == 1:
                progress.start("generating", n_total)
            progress.advance()

        segments = generate_demo(to, seed, progress=show)
    path = locate_manifest("demo", manifests)
    write_manifest(path, segments)
    if as_json:
        print_json({"media": to, "manifest": path, "n_segments": len(segments), "seed": seed, "synthetic": True})
        return
    typer.echo(f"{len(segments)} segments of synthetic video in {to}, listed in {path}")
