"""Checks which of defaults, presets, datasets' files, a user's file and overrides wins, for every file there is."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import echoshift.train.stage1.config_files as config_files
from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.recipes import find_preset
from echoshift.pipeline.cards import MANIFESTS_DIR, DatasetCard, read_dataset_card
from echoshift.pipeline.errors import RunError, SpecError
from echoshift.train.grids import list_grids, list_shifts, plan_runs, read_grid
from echoshift.train.stage1.config import Stage1Config, TrainingConfig
from echoshift.train.stage1.config_files import list_presets, resolve_config
from echoshift.train.stage_settings import resolve_settings

CARDS = sorted(path.stem for path in MANIFESTS_DIR.glob("*.toml"))
HERE = Path(config_files.__file__).parent


def make_card(**changes: Any) -> DatasetCard:
    fields: dict[str, Any] = {
        "name": "mine", "title": "Mine", "task": "single-label", "metric": "top1", "classes": ("a", "b"),
        "domains": ("s", "t"), "encoders": ("resnet18_audio", "i3d_rgb", "slowfast_r50", "resnet_demo"),
    }  # fmt: skip
    return DatasetCard.model_validate(fields | changes)


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("name", CARDS)
def test_every_card_has_a_configuration_of_every_preset(name: str, preset: str) -> None:
    config = resolve_config(read_dataset_card(name), preset)
    assert find_encoder(config.visual.encoder).modality != "audio"
    assert find_encoder(config.sound.encoder).modality == "audio"
    for clips in (config.visual.train_preset, config.visual.test_preset, config.export.label_preset):
        find_preset(clips)
    outputs = find_encoder(config.visual.encoder).output_shapes
    entry = find_encoder(config.visual.encoder)
    assert entry.frame is not None
    assert set(config.export.outputs) <= set(outputs(entry.clip, entry.frame))


def test_presets_are_those_of_the_methods() -> None:
    assert list_presets() == ["paper", "released"]
    paper, released = (resolve_config(make_card(), preset) for preset in list_presets())
    assert (paper.absent.weight, paper.training.batch_norm, paper.absent.gamma) == (1.0, "eval", 0.05)
    assert (released.absent.weight, released.training.batch_norm) == (0.01, "train")
    assert released.export.label_preset == "zhang-encoder-test"
    assert (paper.attention.p_missing, released.attention.p_missing) == (0.1, 0.0)
    with pytest.raises(RunError, match=r"evaluation.sound 'missing' needs attention.p_missing above 0"):
        resolve_config(make_card(), "released", overrides=["evaluation.sound=missing"])
    charades = [resolve_config(read_dataset_card("charades_ego"), preset) for preset in list_presets()]
    assert [(c.balance.beta, c.absent.gamma, c.target_labels.clusters_from) for c in charades] == [
        (0.999, 0.05, "source"),
        (0.99, 0.55, "labelled-target"),
    ]
    assert all(c.target_labels.use_tags and c.training.lr == 6e-5 for c in charades)


@pytest.mark.parametrize("path", sorted((HERE / "datasets").glob("*.toml")), ids=lambda path: path.stem)
def test_every_dataset_file_is_of_a_card_and_of_known_tables(path: Path) -> None:
    assert path.stem in CARDS
    assert set(tomllib.loads(path.read_text())) <= {"any", "flow", *list_presets()}


def test_what_comes_later_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("presets", "datasets"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(config_files, "_PRESETS", tmp_path / "presets")
    monkeypatch.setattr(config_files, "_DATASETS", tmp_path / "datasets")
    keys = ("n_source", "n_target", "n_labelled", "n_epochs", "n_accumulated")

    def write(*levels: int) -> str:
        return "\n".join(f"{key} = {level}" for key, level in zip(keys, levels, strict=False))

    (tmp_path / "presets" / "paper.toml").write_text("[training]\n" + write(101, 101, 101, 101, 101))
    (tmp_path / "presets" / "other.toml").write_text("")
    (tmp_path / "datasets" / "mine.toml").write_text(
        f"[any.training]\n{write(102, 102, 102, 102)}\n[paper.training]\n{write(103, 103, 103)}\n"
        f"[other.training]\nn_source = 999"
    )
    (tmp_path / "user.toml").write_text("[training]\n" + write(104, 104))
    config = resolve_config(make_card(), "paper", tmp_path / "user.toml", ["training.n_source=105"])
    assert [getattr(config.training, key) for key in keys] == [105, 104, 103, 102, 101]
    assert config.training.lr == TrainingConfig().lr, "the default, where nothing says otherwise"
    twice = resolve_config(make_card(), "paper", None, ["training.n_source=1", "training.n_source=2"])
    assert twice.training.n_source == 2


def test_networks_that_nothing_names_are_the_cards_first() -> None:
    config = resolve_config(make_card())
    assert (config.visual.encoder, config.sound.encoder) == ("i3d_rgb", "resnet18_audio")
    named = resolve_config(make_card(), overrides=["visual.encoder=slowfast_r50", "sound.encoder=resnet_demo"])
    assert (named.visual.encoder, named.sound.encoder) == ("slowfast_r50", "resnet_demo")


def test_epics_rates_go_by_the_source() -> None:
    config = resolve_config(read_dataset_card("epic"))
    assert config.training.lr_by_source == {"D1": 2e-4, "D2": 9e-5, "D3": 1e-4}
    assert config.training.n_epochs == 15


def test_epics_flow_has_one_rate_for_every_source(tmp_path: Path) -> None:
    (tmp_path / "flow.toml").write_text('[visual]\nencoder = "slowonly_r50_flow"')
    for config in (
        resolve_config(read_dataset_card("epic"), overrides=["visual.encoder=i3d_flow"]),
        resolve_config(read_dataset_card("epic"), "released", tmp_path / "flow.toml"),
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
def test_a_rate_that_the_user_gives_wins_over_the_datasets(overrides: list[str], rates: dict[str, float]) -> None:
    training = resolve_config(read_dataset_card("epic"), overrides=overrides).training
    assert {source: training.find_lr((source,)) for source in rates} == rates


def test_a_shift_of_several_sources_takes_the_common_rate() -> None:
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
def test_what_does_not_fit_is_named(card: DatasetCard, overrides: list[str], error: type, words: str) -> None:
    with pytest.raises(error) as caught:
        resolve_config(card, overrides=overrides)
    assert words in str(caught.value)


def test_an_unknown_preset_is_told_the_nearest() -> None:
    for name, words in (("papper", "did you mean 'paper'?"), ("x", "there are paper, released"), ("../a", "there are")):
        with pytest.raises(RunError, match="there is no preset") as caught:
            resolve_config(make_card(), name)
        assert words in str(caught.value)


def test_what_is_only_fast_or_slow_decides_no_result() -> None:
    described = [
        resolve_config(make_card(), overrides=overrides).describe()
        for overrides in ([], ["visual.n_readers=3", "visual.n_cached_mb=1"], ["visual.n_views=5"])
    ]
    assert described[0] == described[1] != described[2]
    assert Stage1Config.model_validate(described[0]).describe() == described[0]


@pytest.mark.parametrize("name", CARDS)
def test_every_grid_is_planned_on_every_card(name: str) -> None:
    card = read_dataset_card(name)
    if not card.encoders:  # someone's own videos: the encoders are named with the grid
        pytest.skip(f"the card of {name} names no encoders")
    for grid in map(read_grid, list_grids()):
        if grid.task in (None, card.task) and list_shifts(grid, card):
            planned = plan_runs(grid, card, lambda stage, o: resolve_settings(stage, card, overrides=o).describe())
            assert len(planned) == len(grid.rows) * len(grid.seeds) * len(list_shifts(grid, card))


def test_settings_are_resolved_without_torch() -> None:
    """A grid that is done prints its table in a second; importing torch alone takes two."""
    names = ", ".join(f"echoshift.train.{name}" for name in ("stage_settings", "tables", "grids", "hits"))
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
