"""The command line: puts the commands of the three packages together, and turns errors into one line and a code."""

from __future__ import annotations

import errno
import sys

import typer
from typer.exceptions import TyperException

from echoshift.cli import demo, manifests, stores, weights
from echoshift.cli.doctor import doctor
from echoshift.cli.extraction import extract, plan
from echoshift.cli.grids import ablate, table
from echoshift.cli.look import plot, report, show
from echoshift.cli.names import list_
from echoshift.cli.terminal import is_plain
from echoshift.cli.training import align, stage1, stage2
from echoshift.pipeline.errors import EchoshiftError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
# What a user's folders and disks may do wherever something is read or written; any other OSError is a fault of ours.
_PLACE_ERRORS = frozenset(
    (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ENAMETOOLONG,
    )
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None if is_plain(sys.stdout) else "rich",
    pretty_exceptions_enable=False,
    help="Activity recognition in video under domain shift, bridged by sound.",
)
app.add_typer(manifests.app, name="manifest")
app.add_typer(weights.app, name="weights")
app.add_typer(stores.app, name="store")
app.add_typer(demo.app, name="demo")
app.command()(plan)
app.command()(extract)
app.command()(stage1)
app.command("stage2")(stage2)
app.command("align")(align)
app.command()(ablate)
app.command()(table)
app.command("list")(list_)
app.command()(doctor)
app.command()(report)
app.command()(show)
app.command()(plot)


def main() -> None:
    """Run the command line.

    Exit codes: 0 done; 1 faults found by a check; 2 an error, told in one line; 3 some segments failed;
    130 interrupted.
    """
    try:
        code = app(prog_name="echoshift", standalone_mode=False)
    except EchoshiftError as error:
        print(f"error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except TyperException as error:
        _show_usage_error(error)
        sys.exit(EXIT_ERROR)
    except OSError as error:
        if error.errno not in _PLACE_ERRORS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}; name another place, or see to its rights and room", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:  # newer typers turn the interrupt into this code by themselves, and say nothing
        print("interrupted; what is committed is kept, the same command goes on from there", file=sys.stderr)
    sys.exit(code)


def _show_usage_error(error: TyperException) -> None:
    """Print what is wrong with the command line; a group that was called without a command shows its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "echoshift"
    message = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    print(f"error: {command}: {message[:1].lower()}{message[1:]}; see `{command} --help`", file=sys.stderr)
