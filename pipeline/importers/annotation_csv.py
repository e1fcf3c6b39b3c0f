"""Reads the rows of an official annotation CSV by column name, each with its line."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from echoshift.pipeline.errors import ManifestError


def read_annotation_rows(
    path: Path, columns: Sequence[str], has_header: bool = True
) -> list[tuple[int, dict[str, str]]]:
    """Read (line, cells by column) of the columns asked for; other columns may be there.

    Without a header `columns` name the cells in order. Raises ManifestError naming file and line for a file that isn't
    there or isn't CSV, a missing column, or a row with other than the header's number of cells.
    """
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, []) if has_header else list(columns)
            for name in columns:
                if name not in header:
                    raise ManifestError(f"{path}:1: no column {name!r}; is this the official file?")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise ManifestError(
                        f"{path}:{line}: {len(cells)} cells instead of {len(header)}; get the file again"
                    )
                if cells:
                    named = dict(zip(header, cells, strict=True))
                    rows.append((line, {name: named[name] for name in columns}))
                line = reader.line_num + 1
    except FileNotFoundError as error:
        raise ManifestError(f"no file {path}; the dataset card says where the official files come from") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8; get the file again") from error
    except csv.Error as error:
        raise ManifestError(f"{path}:{reader.line_num}: not valid CSV: {error}; get the file again") from error
    return rows


def parse_seconds(text: str, place: str) -> float:
    """Read a time in seconds; raises ManifestError naming the place for anything but a number of at least 0."""
    try:
        time_s = float(text)
    except ValueError as error:
        raise ManifestError(f"{place}: {text!r} is no time in seconds; correct it") from error
    if not 0 <= time_s < float("inf"):
        raise ManifestError(f"{place}: {text!r} is no time in seconds; correct it")
    return time_s
