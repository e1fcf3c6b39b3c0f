"""`echoshift doctor`: looks over the installation, and says what to do about what isn't as it should be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echoshift.cli.options import DEFAULT_CACHE, CacheOption, ManifestsOption
from echoshift.cli.terminal import JsonOption, is_plain, print_json
from echoshift.pipeline.places import MANIFESTS_DIR

if TYPE_CHECKING:
    from echoshift.extract.doctor import Finding

EXIT_FAULTS = 1
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    cache: CacheOption = DEFAULT_CACHE,
    manifests: ManifestsOption = MANIFESTS_DIR,
    weights: Annotated[
        Path | None, typer.Option(help="Where weights lie; default the user's cache.", envvar="ECHOSHIFT_WEIGHTS")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look over Python, torch, decoders, GPUs, disk, weights and data; ends with 1 if something fails."""
    from echoshift.extract.doctor import list_checks, run_checks

    findings = []
    for finding in run_checks(list_checks(cache, weights, manifests)):
        findings.append(finding)
        if not as_json:
            _print(finding)
    counts = {level: sum(finding.level == level for finding in findings) for level in STYLES}
    if as_json:
        print_json({"fine": not counts["fail"], "counts": counts, "findings": findings})
    else:
        typer.echo(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
    if counts["fail"]:
        raise typer.Exit(EXIT_FAULTS)


def _print(finding: Finding) -> None:
    if is_plain(sys.stdout):
        typer.echo(str(finding))
        return
    from rich.console import Console
    from rich.text import Text

    text = Text(str(finding))
    text.stylize(STYLES[finding.level], 0, len(finding.level))
    Console().print(text, soft_wrap=True)
