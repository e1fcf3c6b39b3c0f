"""Checks how a user's settings are read, laid over others, and told what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from echoshift.pipeline.errors import RunError
from echoshift.train.overrides import make_config, merge_settings, parse_override, read_settings
from echoshift.train.stage1.config import Stage1Config

LEAST: dict[str, Any] = {"visual": {"encoder": "slowfast_demo"}, "sound": {"encoder": "resnet_demo"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.lr=1e-3", {"training": {"lr": 0.001}}),
        (" training . n_epochs = 3 ", {"training": {"n_epochs": 3}}),
        ("attention.enabled=false", {"attention": {"enabled": False}}),
        ("balance.kind=class", {"balance": {"kind": "class"}}),
        ('balance.kind="class"', {"balance": {"kind": "class"}}),
        ("export.train_preset=", {"export": {"train_preset": ""}}),
        ('export.outputs=["a", "b"]', {"export": {"outputs": ["a", "b"]}}),
        ("training.lr_by_source.D1=2e-4", {"training": {"lr_by_source": {"D1": 0.0002}}}),
        ("visual.weights=random:3", {"visual": {"weights": "random:3"}}),
        ("visual.weights=/a=b.pt", {"visual": {"weights": "/a=b.pt"}}),
        ("a=1\nb=2", {"a": "1\nb=2"}),
    ],
)
def test_an_override_is_a_table_with_one_value(text: str, expected: dict[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["training.lr", "=3", ".lr=3", "training.=3", "", "a..b=1"])
def test_what_is_no_override_is_told_what_one_looks_like(text: str) -> None:
    with pytest.raises(RunError, match=r"isn't key=value, such as training\.lr=1e-3"):
        parse_override(text)


def test_tables_are_merged_and_values_replaced_without_touching_either() -> None:
    below: dict[str, Any] = {"a": {"x": 1, "y": {"z": 1}}, "b": [1, 2], "c": 1}
    above: dict[str, Any] = {"a": {"y": {"w": 2}}, "b": [3], "c": {"new": 1}, "d": 4}
    merged = merge_settings(below, above)
    assert merged == {"a": {"x": 1, "y": {"z": 1, "w": 2}}, "b": [3], "c": {"new": 1}, "d": 4}
    assert below == {"a": {"x": 1, "y": {"z": 1}}, "b": [1, 2], "c": 1}
    assert above == {"a": {"y": {"w": 2}}, "b": [3], "c": {"new": 1}, "d": 4}


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no configuration .*nowhere\.toml"):
        read_settings(tmp_path / "nowhere.toml")
    for content in (b"[training\nlr = 1", b"lr = \xff"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(RunError, match=r"bad\.toml isn't valid TOML"):
            read_settings(tmp_path / "bad.toml")
    (tmp_path / "windows.toml").write_bytes(b"\xef\xbb\xbf[training]\r\nlr = 1\r\n")
    assert read_settings(tmp_path / "windows.toml") == {"training": {"lr": 1}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training.lrr=1", "place: training.lrr: no such key; did you mean 'lr'?"),
        ("training.n_epoch=1", "training.n_epoch: no such key; did you mean 'n_epochs'"),
        ("trainin.lr=1", "trainin: no such key; did you mean 'training'?"),
        ("balance.qqqq=1", "balance.qqqq: no such key; there are kind, beta, normalised"),
        ("training.lr=-1", "training.lr: Input should be greater than 0"),
        ("training.lr=fast", "training.lr: Input should be a valid number"),
        ("balance.kind=loud", "balance.kind: Input should be 'none', 'class' or 'audio'"),
        ("training.n_epochs=1.5", "training.n_epochs: Input should be a valid integer"),
        ("training=3", "training: Input should be a valid dictionary or instance of TrainingConfig"),
        ("target_labels={use_tags=true, labelled_fraction=0.5}", "`use_tags` and `labelled_fraction` exclude"),
    ],
)
def test_a_fault_is_named_by_place_and_key(text: str, words: str) -> None:
    with pytest.raises(RunError) as caught:
        make_config(Stage1Config, merge_settings(LEAST, parse_override(text)), "place")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_fault_is_named_at_once() -> None:
    settings = merge_settings(LEAST, {"training": {"lr": -1, "lrr": 1}, "absent": {"gamma": 2}})
    with pytest.raises(RunError) as caught:
        make_config(Stage1Config, settings, "place")
    for key in ("training.lr:", "training.lrr:", "absent.gamma:"):
        assert key in str(caught.value)
