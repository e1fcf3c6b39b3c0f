"""Finds a command by its name, and says which one may have been meant."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from echoshift.pipeline.errors import SpecError, suggest


class SuggestingGroup(TyperGroup):
    """A group of commands that raises SpecError with the nearest names for a command that isn't there."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the arguments begin with."""
        if args and not ctx.resilient_parsing and not args[0].startswith("-"):
            name, known = args[0], [name for name in self.list_commands(ctx) if not self.commands[name].hidden]
            if self.get_command(ctx, name) is None:
                hint = suggest(name, known, listed_by=f"{ctx.command_path} --help")
                raise SpecError(f"there is no command `{ctx.command_path} {name}`; {hint}")
        return super().resolve_command(ctx, args)
