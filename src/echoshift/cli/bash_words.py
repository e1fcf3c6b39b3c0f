"""Puts words back together that bash takes apart at `=` before it asks what completes them."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, MutableMapping

ASKED = "_ECHOSHIFT_COMPLETE"


@contextlib.contextmanager
def joining_bash_words(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Answer bash for what stands behind an `=`, while the block completes the whole word; else does nothing.

    Bash gives KEY, = and VALUE as three of COMP_WORDS, a line each, and puts an answer in the place of the last. So the
    three are joined, COMP_CWORD is moved along, and KEY= is cut from each line that the block prints.
    """
    if environment.get(ASKED) != "complete_bash":
        yield
        return
    words, current = environment.get("COMP_WORDS", "").split("\n"), int(environment.get("COMP_CWORD", "0"))
    joined, place = join_words(words, current)
    environment["COMP_WORDS"], environment["COMP_CWORD"] = "\n".join(joined), str(place)
    begun = joined[place] if place < len(joined) else ""
    cut = begun.rpartition("=")[0] + "=" if "=" in begun and place < current else ""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        sys.stdout.write("".join(line.removeprefix(cut) for line in printed.getvalue().splitlines(keepends=True)))


def join_words(words: list[str], current: int) -> tuple[list[str], int]:
    """Join KEY, = and VALUE up to the word under completion; return the words, and which of them is completed.

    A word that begins with -- is never a value: bash doesn't say whether there was a blank before it.
    """
    joined: list[str] = []
    place = current
    for number, word in enumerate(words):
        is_part = word == "=" or (number > 0 and words[number - 1] == "=" and not word.startswith("--"))
        if is_part and joined and number <= current:
            joined[-1] += word
            place -= 1
        else:
            joined.append(word)
    return joined, place
