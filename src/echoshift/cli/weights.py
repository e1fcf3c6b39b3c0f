"""`echoshift weights` and `echoshift demo`: install weights, generate the synthetic demo data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echoshift.cli.completion import complete_weights
from echoshift.cli.terminal import JsonOption, make_jsonable, print_json

app = typer.Typer(no_args_is_help=True, help="List, install and check the weights of the encoders.")

DirOption = Annotated[
    Path | None, typer.Option("--dir", help="Where weights lie; default the user's cache.", envvar="ECHOSHIFT_WEIGHTS")
]


@app.command("ls")
def list_(directory: DirOption = None, as_json: JsonOption = False) -> None:
    """List the known weights, which are installed, and their licences."""
    from echoshift.cli.terminal import print_table
    from echoshift.extract.weights.load import list_weights

    known = list_weights(directory)
    if as_json:
        print_json(known)
        return
    rows = [
        [row.name, row.encoder, "yes" if row.installed else "no", "default" if row.preferred else "", row.licence]
        for row in known
    ]
    print_table("weights", ("name", "encoder", "installed", "use", "licence"), rows)


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="A name of `weights ls`.", autocompletion=complete_weights)],
    from_: Annotated[Path | None, typer.Option("--from", help="A checkpoint you have downloaded yourself.")] = None,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Install weights: download, check, convert to safetensors once."""
    from echoshift.extract.weights.load import install_weights

    installed = install_weights(name, from_, directory)
    if as_json:
        print_json({"name": name, **make_jsonable(installed)})
        return
    typer.echo(f"{name} for {installed.encoder}: sha256 of the tensors {installed.tensor_sha256}")


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="Installed weights.", autocompletion=complete_weights)],
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hash installed weights again and load them key by key."""
    from echoshift.extract.weights.load import check_weights

    installed = check_weights(name, directory)
    if as_json:
        print_json({"name": name, **make_jsonable(installed)})
        return
    typer.echo(f"{name} for {installed.encoder}: whole, every key used, sha256 {installed.tensor_sha256}")
