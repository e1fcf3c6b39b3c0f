"""CORAL, the method that docs/ prints, from another distribution and built in: it trains and scores as others do."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.pipeline.tensor_files import read_tensors
from echoshift.train.alignment import method, methods
from echoshift.train.alignment.config import AlignmentConfig, keep_used
from echoshift.train.alignment.method import list_builtin
from echoshift.train.runs import RESULTS, RunRecord, read_runs

PAGE, MODULE, NAME = "docs/adding-a-method.md", "coral.py", "coral"
SETTINGS = (
    "alignment.setting=uda",
    "alignment.network.width=8",
    "iterations.n_steps=30",
    "iterations.n_batch=8",
    "iterations.lr_drop_step=10",
    "iterations.n_checkpoints=3",
    "iterations.checkpoint_every=5",
)


@pytest.fixture(scope="module")
def extracted(tiny_shift: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Extract the small data set's features; nobody changes them."""
    root = tmp_path_factory.mktemp("method")
    tiny = tiny_shift.TinyShift(root, root / "runs")
    tiny.make()
    places = ["--media", tiny.media, "--cache", root / "cache", "--manifests", root, "--device", "cpu"]
    for encoder, settings in (
        ("slowfast_demo", ("frame.short_side=36", "frame.crop=32", "clip.n_frames=4")),
        ("resnet_demo", ("audio.duration_s=1.0",)),
    ):
        chosen = [part for setting in settings for part in ("--set", setting)]
        code, _, err = tiny_shift.run("extract", "tiny", *places, "--encoders", encoder, *chosen)
        assert code == 0, err
    return tiny


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doc_checkout: ModuleType, blocks: ModuleType) -> Any:
    """Return what puts the page's distribution on the path, with its text changed, under another name if asked."""

    def put(name: str = NAME, change: tuple[str, str] = ("", "")) -> Path:
        text, pyproject = blocks.find_file(PAGE, MODULE), blocks.find_file(PAGE, "pyproject.toml")
        assert change[0] in text
        folder = tmp_path / f"site-{name}"
        text = text.replace(*change) if change[0] else text
        pyproject = pyproject.replace('coral = "coral:', f'{name} = "{name}:').replace('["coral"]', f'["{name}"]')
        doc_checkout.write_distribution(folder, pyproject, [(f"{name}.py", text)])
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return folder / f"{name}.py"

    return put


def align(tiny: Any, tiny_shift: ModuleType, method: str, *settings: str) -> tuple[int, str]:
    chosen = [part for s in (*SETTINGS, f"alignment.method={method}", *settings) for part in ("--set", s)]
    places = ["--cache", tiny.root / "cache", "--manifests", tiny.root, "--runs", tiny.runs, "--device", "cpu"]
    code, _, err = tiny_shift.run("align", "tiny", "--shift", "s-t", *places, *chosen)
    return code, err


def list_records(tiny: Any) -> list[RunRecord]:
    return read_runs(tiny.runs / "tiny" / RESULTS)


def count_trained(tiny: Any) -> int:
    return sum(path.is_dir() for path in tiny.steps.glob(f"{NAME}_rgb-*"))


def predict_by_hand(weights: dict[str, np.ndarray], visual: np.ndarray, sound: np.ndarray) -> np.ndarray:
    """Predict segments, visual [n, clip, C] and sound [n, C_a]: the mean over clips of softmax(visual + sound)."""

    def stream(name: str, x: np.ndarray) -> np.ndarray:
        part = {key.partition(".")[2]: value for key, value in weights.items()}
        hidden = np.maximum(x @ part[f"project_{name}.weight"].T + part[f"project_{name}.bias"], 0)
        return hidden @ part[f"classify_{name}.weight"].T + part[f"classify_{name}.bias"]

    logits = stream("visual", visual) + stream("audio", sound)[:, None]
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (odds / odds.sum(axis=-1, keepdims=True)).mean(axis=1)


def test_it_trains_and_scores(extracted: Any, tiny_shift: ModuleType, install: Any, tmp_path: Path) -> None:
    file = install()
    tiny = extracted.with_runs(tmp_path / "runs")
    code, err = align(tiny, tiny_shift, NAME)
    assert code == 0, err
    mean, last = list_records(tiny)
    assert (mean.selection, last.selection) == ("mean_last", "last")
    config = mean.config["alignment"]["alignment"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert config["method"] == NAME and config["own"] == {"weight": 1.0}
    assert config["source"] == f"echoshift-coral 1.0 (coral:Coral), file's sha256 {sha256}"
    step = tiny.steps / f"{NAME}_rgb-{mean.steps['trained_rgb']}"
    [done] = [json.loads(path.read_text()) for path in step.glob("*.json")]
    assert done["outcome"]["loss_names"] == ["class", "CORAL visual", "CORAL audio"]

    stores = {open_store(path).spec.encoder: open_store(path) for path in list_stores(tiny.root / "cache")}
    assert all("encoder_source" not in store.attributes for store in stores.values()), "echoshift's own need none"
    with np.load(step / "epochs.npz") as arrays:
        ids, predicted = arrays["target_test ids"].tolist(), arrays["target_test"][-1]
    weights = {name: value.numpy() for name, value in read_tensors(step / "trained.safetensors").items()}
    visual = stores["slowfast_demo"].read(ids, "pooled").astype(np.float32)
    sound = stores["resnet_demo"].read(ids, "pooled")[:, 0].astype(np.float32)
    by_hand = predict_by_hand(weights, visual, sound)
    np.testing.assert_allclose(predicted, by_hand, rtol=1e-4, atol=1e-5)
    rows = [ids.index(f"t-test-{i}") for i in range(4)]
    accuracy = (by_hand[rows].argmax(axis=1) == np.array([0, 1, 0, 1])).mean()
    assert last.scores.main.value == pytest.approx(accuracy)


def test_its_settings_and_its_file_name_a_run(
    extracted: Any, tiny_shift: ModuleType, install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    tiny = extracted.with_runs(tmp_path / "runs")
    for settings in ((), (), ("alignment.own.weight=5",)):
        code, err = align(tiny, tiny_shift, NAME, *settings)
        assert code == 0, err
    assert len({record.config_hash for record in list_records(tiny)}) == 2
    assert count_trained(tiny) == 2, "the same settings train once"
    first = tmp_path / f"site-{NAME}"
    first.rename(tmp_path / "before")
    install(change=("gap.square()", "gap.abs()"))
    first.rename(tmp_path / "changed")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "changed"), *(p for p in sys.path if p != str(first))])
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    code, err = align(tiny, tiny_shift, NAME)
    assert code == 0, err
    assert count_trained(tiny) == 3, "another file trains anew"


PLAIN = """
import torch
from torch import nn

from echoshift.train.alignment.two_streams import TwoStreams


class Plain(nn.Module):
    loss_names = ("class", "zero")

    def __init__(self, config, shapes, n_classes):
        super().__init__()
        self.streams = TwoStreams(config.network, shapes, n_classes)

    def losses(self, step, dropouts):
        source = self.streams.encode(step.source.inputs, "source")
        of_class = self.streams.compute_class_loss(source, step.source.labels, dropouts)
        return torch.stack([of_class, 0 * of_class])

    def predict(self, inputs, domain):
        return self.streams.predict(inputs, domain)
"""


def test_a_module_with_losses_and_predictions_of_its_own_trains_too(
    extracted: Any,
    tiny_shift: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    doc_checkout: ModuleType,
    blocks: ModuleType,
) -> None:
    pyproject = blocks.find_file(PAGE, "pyproject.toml").replace('coral = "coral:Coral"', 'plain = "plain:Plain"')
    doc_checkout.write_distribution(
        tmp_path / "site", pyproject.replace('["coral"]', '["plain"]'), [("plain.py", PLAIN)]
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    tiny = extracted.with_runs(tmp_path / "runs")
    losses = {}
    for name in ("plain", "source_only"):
        code, err = align(tiny, tiny_shift, name)
        assert code == 0, err
        step = tiny.steps / f"{name}_rgb-{list_records(tiny)[-1].steps['trained_rgb']}"
        losses[name] = np.array(json.loads((step / "record.json").read_text())["outcome"]["losses"])
    np.testing.assert_array_equal(losses["plain"], np.pad(losses["source_only"], ((0, 0), (0, 1))))


WRONG = {
    "no_terms": (('    loss_names = ("class", "CORAL visual", "CORAL audio")\n', ""), (), "lacks loss_names"),
    "no_method": (
        ("class Coral(AlignmentMethod)", "class Coral"),
        (),
        "a class derived from AlignmentMethod or torch.",
    ),
    "odd_settings": (
        ("class Settings(SpecModel)", "class Settings"),
        (),
        "must derive from echoshift.pipeline.specs",
    ),
    "unknown_key": (("", ""), ("alignment.own.wieght=1",), "own.wieght: Extra inputs are not permitted; it has weight"),
    "wrong_value": (("", ""), ("alignment.own.weight=-1",), "own.weight: Input should be greater than or equal to 0"),
    "not_built": (
        (
            "    def compute_terms(",
            "    def add_heads(self):\n        raise OSError('no file')\n\n    def compute_terms(",
        ),
        (),
        "can't be built: OSError: no file",
    ),
    "more_terms": ((', "CORAL audio")', ")"), (), "are of shape [3], its loss_names are 2"),
    "needs_target": (("", ""), ("alignment.setting=dg",), "adapts to the target; it needs"),
    "not_there": (
        ("from pydantic", "import no_such\nfrom pydantic"),
        (),
        "can't be loaded: ModuleNotFoundError",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_method_is_one_clear_line(
    kind: str, extracted: Any, tiny_shift: ModuleType, install: Any, tmp_path: Path
) -> None:
    change, settings, message = WRONG[kind]
    name = f"wrong_{kind}"
    install(name, change)
    code, err = align(extracted.with_runs(tmp_path / "runs"), tiny_shift, name, *settings)
    assert code == 2
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in err


def test_a_name_that_is_taken_is_refused(
    extracted: Any,
    tiny_shift: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    install: Any,
    doc_checkout: ModuleType,
    blocks: ModuleType,
) -> None:
    install()
    pyproject = blocks.find_file(PAGE, "pyproject.toml").replace('coral = "', 'rna = "')
    doc_checkout.write_distribution(tmp_path / "twin", pyproject.replace("echoshift-coral", "twin"), [])
    monkeypatch.syspath_prepend(tmp_path / "twin")
    code, err = align(extracted.with_runs(tmp_path / "runs"), tiny_shift, "rna")
    assert code == 2 and "'rna' of twin 1.0" in err and "has the name of one of echoshift's own" in err


def test_methods_with_a_part_of_their_own_take_no_other_settings(
    extracted: Any, tiny_shift: ModuleType, tmp_path: Path
) -> None:
    code, err = align(extracted.with_runs(tmp_path), tiny_shift, "rna", "alignment.own.weight=1")
    assert code == 2 and "has no settings of its own, such as 'weight'; it reads alignment.rna" in err


def test_coral_is_the_squared_distance_of_covariances_over_4_d_squared(install: Any) -> None:
    file = install()
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None and spec.loader is not None
    coral = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(coral)
    rng = np.random.default_rng(0)
    source, target = rng.standard_normal((9, 3)), 2 * rng.standard_normal((5, 3)) + 1
    expected = np.square(np.cov(source.T) - np.cov(target.T)).sum() / (4 * 3**2)
    found = coral.coral_loss(torch.from_numpy(source), torch.from_numpy(target))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    # By hand: variances 2 and 8 of one feature, (2 - 8)^2 / 4.
    assert coral.coral_loss(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])).item() == pytest.approx(9.0)
    assert coral.coral_loss(torch.ones(1, 3), torch.ones(4, 3)).item() == 0
    assert len(file.read_text().splitlines()) < 60


def test_the_same_file_built_in_is_a_method_and_changes_no_other(
    extracted: Any,
    tiny_shift: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    blocks: ModuleType,
) -> None:
    def describe(name: str) -> dict[str, Any]:
        needs = {"adabn": {"batch_norm": True}, "yang_rerun": {"fusion": "mid"}}.get(name, {})
        config = AlignmentConfig.model_validate({"method": name, "setting": "uda", "network": needs})
        return config.model_dump(mode="json")

    before = {name: describe(name) for name in list_builtin()}
    (tmp_path / MODULE).write_text(blocks.find_file(PAGE, MODULE))
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    for found in (method.list_builtin, method.load_builtin):
        found.cache_clear()
    try:
        assert NAME in list_builtin()
        assert {name: describe(name) for name in before} == before
        assert all("own" not in described and "source" not in described for described in before.values())
        tiny = extracted.with_runs(tmp_path / "runs")
        code, out, err = tiny_shift.run("list", "methods")
        assert code == 0 and NAME in out.split()
        code, err = align(tiny, tiny_shift, NAME, "alignment.own.weight=2")
        assert code == 0, err
        config = list_records(tiny)[0].config["alignment"]["alignment"]
        assert config["own"] == {"weight": 2.0} and "source" not in config
        assert keep_used(config).keys() == {"method", "setting", "class_weight", "network", "own"}
    finally:
        for found in (method.list_builtin, method.load_builtin):
            found.cache_clear()
