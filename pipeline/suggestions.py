"""What else there is where a name is unknown: the nearest names, and how to see all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

N_NEAREST = 3
N_LISTED = 24
_CUTOFF = 0.6
_BAND = 0.1  # how much less alike than the nearest another name may be, and still be offered
_N_CONTAINED = 3  # characters, from which on a name within another counts as near


def find_nearest(name: str, known: Iterable[str], n: int = N_NEAREST) -> list[str]:
    """Find up to n of the known names that a mistyped one may have meant, the most alike first; [] where none may.

    Letters' case doesn't count. Where no name is alike (ratio of difflib's SequenceMatcher of 0.6 or more), those count
    that begin with the mistyped one, or with which it begins.
    """
    by_lower: dict[str, str] = {}
    for one in known:
        by_lower.setdefault(one.lower(), one)
    wanted = name.lower()
    close = difflib.get_close_matches(wanted, by_lower, n=n, cutoff=_CUTOFF)
    if not close:
        longer = [one for one in by_lower if min(len(one), len(wanted)) >= _N_CONTAINED]
        return [by_lower[one] for one in longer if one.startswith(wanted) or wanted.startswith(one)][:n]
    ratios = {one: difflib.SequenceMatcher(None, one, wanted).ratio() for one in by_lower if one in close}
    near = sorted(ratios, key=lambda one: -ratios[one])  # of the equally alike, the first known comes first
    return [by_lower[one] for one in near if ratios[one] >= ratios[near[0]] - _BAND]


def suggest(name: str, known: Iterable[str], *, listed_by: str = "", there: str = "there are") -> str:
    """Write the end of an error about an unknown name: `did you mean 'a' or 'b'?`, or what there is.

    `listed_by` is the command that lists them all; without it a list of more than 24 names is cut short. `there` are
    the words before a list, such as `it has`.
    """
    names = list(dict.fromkeys(known))
    see = f"`{listed_by}` lists all" if listed_by else ""
    near = find_nearest(name, names)
    if near:
        return f"did you mean {_join(near)}?" + (f" {see}" if see else "")
    if len(names) <= N_LISTED:
        return f"{there} {', '.join(names) or 'none'}"
    shown = f"{there} {', '.join(names[:N_LISTED])}, … {len(names)} in all"
    return f"{shown}; {see}" if see else shown


def _join(names: list[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
