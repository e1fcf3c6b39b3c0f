"""Checks that reports become JSON unrounded, and that what has no place in JSON is refused."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from echoshift.cli.terminal import make_jsonable, print_json


class Form(StrEnum):
    npz = "npz"


class Inner(BaseModel):
    value: float
    when: datetime


@dataclass(frozen=True)
class Report:
    path: Path
    inner: Inner
    form: Form
    counts: dict[str, np.int64]
    values: np.ndarray
    names: tuple[str, ...]


def test_a_report_of_every_kind_is_one_document_with_all_its_digits(capsys: pytest.CaptureFixture[str]) -> None:
    share = float(np.nextafter(0.1, 1))  # differs from 0.1 in the last digit alone
    report = Report(
        Path("a/b"),
        Inner(value=share, when=datetime(2026, 11, 26, 14, tzinfo=UTC)),
        Form.npz,
        {"n": np.int64(2**53 + 1)},
        np.array([1.5, math.nan]),
        ("y", "z"),
    )
    print_json({"report": report, "inf": math.inf, "missing": None})
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "report": {
            "path": "a/b",
            "inner": {"value": share, "when": "2026-11-26T14:00:00Z"},
            "form": "npz",
            "counts": {"n": 2**53 + 1},
            "values": [1.5, None],
            "names": ["y", "z"],
        },
        "inf": None,
        "missing": None,
    }


def test_what_json_cannot_hold_is_refused_by_its_type() -> None:
    with pytest.raises(TypeError, match=r"^object has no place in JSON$"):
        make_jsonable({"deep": [1, (object(),)]})
