"""Tells in one line what is wrong with a command line: the option or argument, its command, and what there is."""

from __future__ import annotations

import re
import sys

from typer.exceptions import TyperException

from echoshift.pipeline.errors import find_nearest, suggest

_NOT_ONE_OF = re.compile(r"'(?P<given>[^']*)' is not one of (?P<choices>'.*')\.?$")


def show_usage_error(error: TyperException) -> None:
    """Print the line on stderr; a group that was called without a command shows its help instead."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
    else:
        print(f"error: {describe_usage_error(error)}", file=sys.stderr)


def describe_usage_error(error: TyperException) -> str:
    """Describe an error of the command line's parser as `COMMAND: what; remedy`."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "echoshift"
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and option is not None:
        known = [name for param in context.command.params for name in param.opts] if context is not None else []
        names = sorted(name for name in known if name.startswith("--"))
        return f"{command}: no option {option!r}; {suggest(option, names, listed_by=f'{command} --help')}"
    message = " ".join(error.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
    return f"{command}: {message[:1].lower()}{message[1:]}; {_suggest_choice(message) or f'see `{command} --help`'}"


def _suggest_choice(message: str) -> str:
    """Suggest the nearest of the values that a message lists; "" where it lists none, or none is near."""
    found = _NOT_ONE_OF.search(message)
    if found is None:
        return ""
    choices = re.findall(r"'([^']*)'", found["choices"])
    return suggest(found["given"], choices) if find_nearest(found["given"], choices) else ""
