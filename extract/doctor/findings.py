"""What a look over an installation finds, and runs the checks one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from echoshift.pipeline.errors import EchoshiftError

Level = Literal["ok", "warn", "fail"]
Check = Callable[[], Iterable["Finding"]]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        level: `ok`; `warn`, where something works less well or isn't there yet; `fail`, where a command would end.
        part: what was looked at, in a word or two.
        message: what was found.
        remedy: what to do about it, "" where nothing is to be done.
    """

    level: Level
    part: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return it as one line: level, part, message and remedy."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.level:<4}  {self.part:<13}  {self.message}{remedy}"


def run_checks(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Run checks by the part that they look at; one that can't be run is itself a finding, and the others go on."""
    for part, check in checks:
        try:
            yield from check()
        except (EchoshiftError, ImportError, OSError, RuntimeError, ValueError, AttributeError) as error:
            words = " ".join(str(error).split()) or type(error).__name__
            yield Finding("fail", part, f"{type(error).__name__}: {words}", "mend what it names, then run doctor again")
