"""Stage 2's presets and dataset tables, parsed straight from their files."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from echoshift.train import stage2
from echoshift.train.overrides import merge_settings
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage2.config import Stage2Config

HERE = Path(str(stage2.__file__)).parent
PRESETS, DATASETS = sorted(HERE.glob("presets/*.toml")), sorted(HERE.glob("datasets/*.toml"))


def read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_the_files_are_those_that_are_documented() -> None:
    assert [path.stem for path in PRESETS] == ["paper", "quick", "released"]
    assert [path.stem for path in DATASETS] == ["charades_ego", "demo", "epic"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_with_every_dataset_s_tables(path: Path) -> None:
    for dataset in DATASETS:
        tables = read(dataset)
        presets = [preset.stem for preset in PRESETS]
        assert set(tables) <= {"any", "flow", *presets, *(f"{name}-flow" for name in presets)}, dataset.name
        settings = read(path)
        for table in ("any", path.stem, "flow", f"{path.stem}-flow"):
            settings = merge_settings(settings, tables.get(table, {}))
        Stage2Config.model_validate(settings)


def test_the_paper_is_the_defaults() -> None:
    assert Stage2Config.model_validate(read(HERE / "presets/paper.toml")) == Stage2Config()


def test_released_is_what_the_table_of_differences_says() -> None:
    config = Stage2Config.model_validate(read(HERE / "presets/released.toml"))
    chosen, loss, schedule = config.recogniser, config.loss, config.schedule
    assert (chosen.width, chosen.bank_width, chosen.n_layers, chosen.mlp_width) == (256, 512, 3, 512)
    assert (chosen.fc, chosen.fc_width, chosen.visual_width, chosen.dropout) == ("hidden", 512, 64, 0.15)
    assert (loss.source, loss.target, loss.sound_terms_on) == (0.5, 0.5, "source")
    assert loss.h == 0.1
    assert loss.h_prime == pytest.approx(0.1 * 0.2)
    assert (schedule.lr, schedule.weight_decay, schedule.n_source, schedule.n_target) == (7e-4, 1e-4, 8, 8)
    assert schedule.n_epochs == 29


def test_quick_is_the_paper_s_recogniser_in_fewer_steps() -> None:
    quick, paper = Stage2Config.model_validate(read(HERE / "presets/quick.toml")), Stage2Config()
    assert (quick.recogniser, quick.loss, quick.pseudo_labels) == (paper.recogniser, paper.loss, paper.pseudo_labels)

    n_steps = paper.schedule.n_epochs * (1543 // paper.schedule.n_source)  # EPIC's D1
    assert n_steps == 29 * 192
    assert quick.schedule.n_steps * 10 < n_steps


def test_no_part_has_the_name_of_one_of_stage_1() -> None:
    assert not set(Stage2Config.model_fields) & set(Stage1Config.model_fields)


def test_what_is_told_of_a_configuration_is_what_decides_its_result() -> None:
    described = Stage2Config.model_validate({"data": {"max_memory_mb": 1}}).describe()
    assert described == Stage2Config().describe()
    assert set(described) == set(Stage2Config.model_fields) - {"data"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"streams": [{"name": "rgb"}, {"name": "rgb"}]}, "two streams have one name: rgb, rgb"),
        ({"streams": []}, "at least 1 item"),
        ({"recogniser": {"layers": 2}}, "Extra inputs are not permitted"),
        ({"selection": {"rules": ["best"]}}, "target_oracle"),
    ],
)
def test_faults_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Stage2Config.model_validate(settings)
