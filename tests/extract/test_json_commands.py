"""Checks that every command that reports answers --json with one document, whose numbers are those of the store."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from echoshift.cli.terminal import print_json
from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.open import list_stores, open_store

ENCODER = ("--encoders", "resnet_demo")


def ask(tiny, *arguments: object, code: int = 0) -> Any:
    """Run a command with --json; return the document, once it is sure that nothing else is on stdout."""
    found, out, err = tiny.run(*arguments, "--json")
    assert found == code, err
    (line,) = out.splitlines()
    return json.loads(line)


def test_from_manifest_to_store(tiny, tiny_dataset, tmp_path) -> None:
    tiny.add_videos("v", n_each=2)
    (tiny.media / "w.mp4").write_text("no video")
    tiny.write_manifest(tiny_dataset.make_segments(["v", "w"], 2))
    shown = ask(tiny, "manifest", "show", "tiny", "--manifests", tiny.root)
    assert (shown["n_segments"], shown["splits"][0]["n_per_class"]) == (4, {"a": 4, "b": 0})

    extracted = ask(tiny, "extract", "tiny", *tiny.places, *ENCODER, "--device", "cpu", "--quiet", code=3)
    (made,) = extracted["stores"]
    assert (made["encoder"], made["n_done"], made["n_failed"], made["n_silent"]) == ("resnet_demo", 2, 2, 0)
    assert extracted["n_failed"] == 2
    assert {failure["segment_id"] for failure in made["failures"]} == {"w-0", "w-1"}

    listed = ask(tiny, "store", "ls", "--cache", tiny.cache)
    for row, path in zip(listed, list_stores(tiny.cache), strict=True):
        store = open_store(path)
        assert row["store"] == str(path)
        assert row["n_done"] == int((store.read_array("state") == DONE).sum()) == 2
        assert row["n_bytes"] == sum(
            f.stat().st_size for f in (tiny.cache / "tiny" / path.name).rglob("*") if f.is_file()
        )
    one = listed[0]["store"]
    info = ask(tiny, "store", "info", one)
    assert info["rows"] == {"done": 2, "failed": 2}
    assert info["attributes"]["fingerprint"] == listed[0]["fingerprint"]
    audited = ask(tiny, "store", "audit", one, "--quiet")
    pooled = next(found for found in audited["outputs"] if found["output"] == "pooled")
    values = open_store(one).read(["v-0", "v-1"], "pooled").astype("float64")
    assert pooled["mean"] == pytest.approx(values.mean(), rel=1e-6)
    exported = ask(tiny, "store", "export", one, "--to", tmp_path / "f.npz")
    assert exported["n_segments"] == 2


def test_a_check_that_finds_faults_ends_with_1_and_still_answers(tiny) -> None:
    tiny.add_videos("v", n_each=2)
    path = tiny.root / "tiny.csv"
    path.write_text(path.read_text().replace("v-1,v,0.5,1.7", "v-1,v,2.5,1.7"))
    found = ask(tiny, "manifest", "check", "tiny", "--manifests", tiny.root, code=1)
    assert found["n_errors"] == 1
    (fault,) = found["faults"]
    assert (fault["line"], fault["segment_id"], fault["level"]) == (3, "v-1", "error")


def test_an_error_leaves_stdout_empty(tiny) -> None:
    code, out, err = tiny.run("store", "info", tiny.cache / "tiny" / "none.zarr", "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: no feature store at ")
    assert len(err.splitlines()) == 1


def test_the_weights_are_listed_with_their_sources(tiny) -> None:
    rows = {row["name"]: row for row in ask(tiny, "weights", "ls", "--dir", tiny.root / "weights")}
    assert rows["i3d-rgb-kinetics400"]["installed"] is False
    assert rows["i3d-rgb-kinetics400"]["path"] is None
    assert rows["i3d-rgb-kinetics400"]["encoder"] == "i3d_rgb"


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
    names: frozenset[str]


def test_a_report_of_every_kind_is_one_document_with_all_its_digits(capsys: pytest.CaptureFixture[str]) -> None:
    share = float(np.nextafter(0.1, 1))  # differs from 0.1 in the last digit alone
    report = Report(
        Path("a/b"),
        Inner(value=share, when=datetime(2026, 11, 26, 14, tzinfo=UTC)),
        Form.npz,
        {"n": np.int64(2**53 + 1)},
        np.array([1.5, math.nan]),
        frozenset({"y"}),
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
            "names": ["y"],
        },
        "inf": None,
        "missing": None,
    }
