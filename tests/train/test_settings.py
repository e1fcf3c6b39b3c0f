"""Which of defaults, presets, datasets' files, a user's file and overrides wins, and what is wrong with them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.recipes import find_preset
from echoshift.pipeline.cards import MANIFESTS_DIR, DatasetCard, read_dataset_card
from echoshift.pipeline.errors import RunError, SpecError
from echoshift.train import settings as settings_module
from echoshift.train.grids import list_grids, list_shifts, plan_runs, read_grid
from echoshift.train.settings import (
    KINDS,
    list_presets,
    make_config,
    merge_settings,
    parse_override,
    read_settings,
    resolve_config,
    resolve_settings,
)
from echoshift.train.stage1.config import Stage1Config, TrainingConfig
from echoshift.train.stage2.config import Stage2Config

CARDS = sorted(path.stem for path in MANIFESTS_DIR.glob("*.toml"))
HERE = Path(settings_module.__file__).parent
resolve_stage1 = partial(resolve_config, Stage1Config)
LEAST: dict[str, Any] = {"visual": {"encoder": "slowfast_demo"}, "sound": {"encoder": "resnet_demo"}}


def make_card(**changes: Any) -> DatasetCard:
    fields: dict[str, Any] = {
        "name": "mine", "title": "Mine", "task": "single-label", "metric": "top1", "classes": ("a", "b"),
        "domains": ("s", "t"), "encoders": ("resnet18_audio", "i3d_rgb", "slowfast_r50", "resnet_demo"),
    }  # fmt: skip
    return DatasetCard.model_validate(fields | changes)


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("name", CARDS)
def test_every_card_has_a_configuration_of_every_preset(name, preset):
    config = resolve_stage1(read_dataset_card(name), preset)
    assert find_encoder(config.visual.encoder).modality != "audio"
    assert find_encoder(config.sound.encoder).modality == "audio"
    for clips in (config.visual.train_preset, config.visual.test_preset, config.export.label_preset):
        find_preset(clips)
    outputs = find_encoder(config.visual.encoder).output_shapes
    entry = find_encoder(config.visual.encoder)
    assert set(config.export.outputs) <= set(outputs(entry.clip, entry.frame))


def test_presets_are_those_of_the_methods():
    assert list_presets("stage1") == ["paper", "released"]
    paper, released = (resolve_stage1(make_card(), preset) for preset in list_presets("stage1"))
    assert (paper.absent.weight, paper.training.batch_norm, paper.absent.gamma) == (1.0, "eval", 0.05)
    assert (released.absent.weight, released.training.batch_norm) == (0.01, "train")
    assert released.export.label_preset == "zhang-encoder-test"
    assert (paper.attention.p_missing, released.attention.p_missing) == (0.1, 0.0)
    with pytest.raises(RunError, match=r"evaluation.sound 'missing' needs attention.p_missing above 0"):
        resolve_stage1(make_card(), "released", overrides=["evaluation.sound=missing"])
    charades = [resolve_stage1(read_dataset_card("charades_ego"), preset) for preset in list_presets("stage1")]
    assert [(c.balance.beta, c.absent.gamma, c.target_labels.clusters_from) for c in charades] == [
        (0.999, 0.05, "source"),
        (0.99, 0.55, "labelled-target"),
    ]
    assert all(c.target_labels.use_tags and c.training.lr == 6e-5 for c in charades)


@pytest.mark.parametrize("stage", KINDS)
@pytest.mark.parametrize("name", CARDS)
def test_every_dataset_file_is_valid_with_every_preset_and_each_table(stage, name):
    path = HERE / stage / "datasets" / f"{name}.toml"
    tables = tomllib.loads(path.read_text()) if path.exists() else {}
    presets = list_presets(stage)
    assert set(tables) <= {"any", "flow", *presets, *(f"{preset}-flow" for preset in presets)}
    for preset in presets:
        settings = merge_settings(
            LEAST if stage == "stage1" else {}, read_settings(HERE / stage / f"presets/{preset}.toml")
        )
        for table in ("any", preset, "flow", f"{preset}-flow"):
            settings = merge_settings(settings, tables.get(table, {}))
        make_config(KINDS[stage], settings, f"{name}, {preset}")


def test_the_files_are_those_that_are_documented():
    assert {stage: list_presets(stage) for stage in KINDS} == {
        "stage1": ["paper", "released"],
        "stage2": ["paper", "quick", "released"],
        "alignment": ["paper", "quick"],
    }
    for path in HERE.glob("*/datasets/*.toml"):
        assert path.stem in CARDS


def test_what_comes_later_wins(tmp_path, monkeypatch):
    for folder in ("presets", "datasets"):
        (tmp_path / "stage1" / folder).mkdir(parents=True)
    monkeypatch.setattr(settings_module, "_FOLDER", tmp_path)
    keys = ("n_source", "n_target", "n_labelled", "n_epochs", "n_accumulated")

    def write(*levels: int) -> str:
        return "\n".join(f"{key} = {level}" for key, level in zip(keys, levels, strict=False))

    (tmp_path / "stage1" / "presets" / "paper.toml").write_text("[training]\n" + write(101, 101, 101, 101, 101))
    (tmp_path / "stage1" / "presets" / "other.toml").write_text("")
    (tmp_path / "stage1" / "datasets" / "mine.toml").write_text(
        f"[any.training]\n{write(102, 102, 102, 102)}\n[paper.training]\n{write(103, 103, 103)}\n"
        f"[other.training]\nn_source = 999"
    )
    (tmp_path / "user.toml").write_text("[training]\n" + write(104, 104))
    config = resolve_stage1(make_card(), "paper", tmp_path / "user.toml", ["training.n_source=105"])
    assert [getattr(config.training, key) for key in keys] == [105, 104, 103, 102, 101]
    assert config.training.lr == TrainingConfig().lr, "the default, where nothing says otherwise"
    twice = resolve_stage1(make_card(), "paper", None, ["training.n_source=1", "training.n_source=2"])
    assert twice.training.n_source == 2


def test_networks_that_nothing_names_are_the_cards_first():
    config = resolve_stage1(make_card())
    assert (config.visual.encoder, config.sound.encoder) == ("i3d_rgb", "resnet18_audio")
    named = resolve_config(
        Stage1Config, make_card(), overrides=["visual.encoder=slowfast_r50", "sound.encoder=resnet_demo"]
    )
    assert (named.visual.encoder, named.sound.encoder) == ("slowfast_r50", "resnet_demo")


def test_epics_rates_go_by_the_source():
    config = resolve_stage1(read_dataset_card("epic"))
    assert config.training.lr_by_source == {"D1": 2e-4, "D2": 9e-5, "D3": 1e-4}
    assert config.training.n_epochs == 15


def test_epics_flow_has_one_rate_for_every_source(tmp_path):
    (tmp_path / "flow.toml").write_text('[visual]\nencoder = "slowonly_r50_flow"')
    for config in (
        resolve_stage1(read_dataset_card("epic"), overrides=["visual.encoder=i3d_flow"]),
        resolve_stage1(read_dataset_card("epic"), "released", tmp_path / "flow.toml"),
    ):
        rates = {config.training.find_lr((source,)) for source in ("D1", "D2", "D3")}
        assert rates == {1e-4}
        assert config.training.n_epochs == 17


@pytest.mark.parametrize(
    ("overrides", "rates"),
    [
        (["training.lr=1e-3"], {"D1": 1e-3, "D2": 1e-3}),
        (["training.lr_by_source.D1=1e-3"], {"D1": 1e-3, "D2": 9e-5}),
        (["training.lr=1e-3", "training.lr_by_source.D2=5e-3"], {"D1": 1e-3, "D2": 5e-3}),
        (["training.lr_by_source.D2=5e-3", "training.lr=1e-3"], {"D1": 1e-3, "D2": 1e-3}),
        (["training.n_epochs=3"], {"D1": 2e-4, "D2": 9e-5}),
    ],
)
def test_a_rate_that_the_user_gives_wins_over_the_datasets(overrides, rates):
    training = resolve_stage1(read_dataset_card("epic"), overrides=overrides).training
    assert {source: training.find_lr((source,)) for source in rates} == rates


def test_a_shift_of_several_sources_takes_the_common_rate():
    training = TrainingConfig(lr=3e-4, lr_by_source={"D1": 2e-4})
    assert training.find_lr(("D1",)) == 2e-4
    assert training.find_lr(("D2",)) == 3e-4
    assert training.find_lr(("D1", "D2")) == 3e-4


@pytest.mark.parametrize(
    ("card", "overrides", "error", "words"),
    [
        (make_card(), ["visual.encoder=resnet_demo"], RunError, "visual.encoder: resnet_demo hears, it doesn't see"),
        (make_card(), ["sound.encoder=i3d_rgb"], RunError, "sound.encoder: i3d_rgb sees, it doesn't hear"),
        (make_card(), ["visual.encoder=i3d_rbg"], SpecError, "did you mean 'i3d_rgb'?"),
        (make_card(encoders=("i3d_rgb",)), [], RunError, "names no encoder for sound; say which: sound.encoder="),
        (make_card(encoders=("resnet_demo",)), [], RunError, "no encoder for visual; say which: visual.encoder="),
        (make_card(), ["visual=3"], RunError, "visual is a table"),
        (make_card(name="epic"), ["visual=3"], RunError, "visual is a table"),
        (make_card(), ["training.lrr=3"], RunError, "configuration of Stage 1 (paper): training.lrr: no such key"),
    ],
)
def test_what_does_not_fit_is_named(card, overrides, error, words):
    with pytest.raises(error) as caught:
        resolve_stage1(card, overrides=overrides)
    assert words in str(caught.value)


def test_an_unknown_preset_is_told_the_nearest():
    for name, words in (
        ("papper", "did you mean 'paper'?"),
        ("x", "there are paper, quick, released"),
        ("../a", "there are"),
    ):
        with pytest.raises(RunError, match="unknown preset") as caught:
            resolve_stage1(make_card(), name)
        assert words in str(caught.value)


def test_what_is_only_fast_or_slow_decides_no_result():
    described = [
        resolve_stage1(make_card(), overrides=overrides).describe()
        for overrides in ([], ["visual.n_readers=3", "visual.n_cached_mb=1"], ["visual.n_views=5"])
    ]
    assert described[0] == described[1] != described[2]
    assert Stage1Config.model_validate(described[0]).describe() == described[0]


@pytest.mark.parametrize("name", CARDS)
def test_every_grid_is_planned_on_every_card(name):
    card = read_dataset_card(name)
    if not card.encoders:  # someone's own videos: the encoders are named with the grid
        pytest.skip(f"the card of {name} names no encoders")
    for grid in map(read_grid, list_grids()):
        if grid.task in (None, card.task) and list_shifts(grid, card):
            planned = plan_runs(grid, card, lambda stage, o: resolve_settings(stage, card, overrides=o).describe())
            assert len(planned) == len(grid.rows) * len(grid.seeds) * len(list_shifts(grid, card))


def test_settings_are_resolved_without_torch():
    """A grid that is done prints its table in a second; importing torch alone takes two."""
    names = ", ".join(f"echoshift.train.{name}" for name in ("settings", "tables", "grids"))
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


# Stage 2's presets


def test_the_paper_is_the_defaults():
    for stage in KINDS:
        assert read_settings(HERE / stage / "presets/paper.toml") == {}


def test_stage_2_released_is_what_the_table_of_differences_says():
    config = resolve_config(Stage2Config, make_card(), "released")
    chosen, loss, schedule = config.recogniser, config.loss, config.schedule
    assert (chosen.width, chosen.bank_width, chosen.n_layers, chosen.mlp_width) == (256, 512, 3, 512)
    assert (chosen.fc, chosen.fc_width, chosen.visual_width, chosen.dropout) == ("hidden", 512, 64, 0.15)
    assert (loss.source, loss.target, loss.sound_terms_on) == (0.5, 0.5, "source")
    assert loss.h == 0.1
    assert loss.h_prime == pytest.approx(0.1 * 0.2)
    assert (schedule.lr, schedule.weight_decay, schedule.n_source, schedule.n_target) == (7e-4, 1e-4, 8, 8)
    assert schedule.n_epochs == 29


def test_quick_is_the_paper_s_recogniser_in_fewer_steps():
    quick, paper = resolve_config(Stage2Config, make_card(), "quick"), Stage2Config()
    assert (quick.recogniser, quick.loss, quick.pseudo_labels) == (paper.recogniser, paper.loss, paper.pseudo_labels)

    n_steps = paper.schedule.n_epochs * (1543 // paper.schedule.n_source)  # EPIC's D1
    assert n_steps == 29 * 192
    assert quick.schedule.n_steps * 10 < n_steps


def test_no_part_of_a_stage_has_the_name_of_another_s():
    parts = [part for kind in KINDS.values() for part in kind.model_fields]
    assert len(parts) == len(set(parts))


def test_what_is_told_of_a_configuration_is_what_decides_its_result():
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
def test_faults_of_stage_2_are_named(settings, words):
    with pytest.raises(ValidationError, match=words):
        Stage2Config.model_validate(settings)


# Files and overrides


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
def test_an_override_is_a_table_with_one_value(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["training.lr", "=3", ".lr=3", "training.=3", "", "a..b=1"])
def test_what_is_no_override_is_told_what_one_looks_like(text):
    with pytest.raises(RunError, match=r"isn't key=value, such as training\.lr=1e-3"):
        parse_override(text)


def test_tables_are_merged_and_values_replaced_without_touching_either():
    below: dict[str, Any] = {"a": {"x": 1, "y": {"z": 1}}, "b": [1, 2], "c": 1}
    above: dict[str, Any] = {"a": {"y": {"w": 2}}, "b": [3], "c": {"new": 1}, "d": 4}
    merged = merge_settings(below, above)
    assert merged == {"a": {"x": 1, "y": {"z": 1, "w": 2}}, "b": [3], "c": {"new": 1}, "d": 4}
    assert below == {"a": {"x": 1, "y": {"z": 1}}, "b": [1, 2], "c": 1}
    assert above == {"a": {"y": {"w": 2}}, "b": [3], "c": {"new": 1}, "d": 4}


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path):
    with pytest.raises(RunError, match=r"no configuration file .*nowhere\.toml"):
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
def test_a_fault_is_named_by_place_and_key(text, words):
    with pytest.raises(RunError) as caught:
        make_config(Stage1Config, merge_settings(LEAST, parse_override(text)), "place")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_fault_is_named_at_once():
    settings = merge_settings(LEAST, {"training": {"lr": -1, "lrr": 1}, "absent": {"gamma": 2}})
    with pytest.raises(RunError) as caught:
        make_config(Stage1Config, settings, "place")
    for key in ("training.lr:", "training.lrr:", "absent.gamma:"):
        assert key in str(caught.value)
