"""Checks that the audio classifier learns what sound tells, changes what it may, and leaves silence out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoder
import torch
from torch import Tensor

from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.extract.encoders.registry import find_encoder
from echoshift.pipeline.errors import RunError
from echoshift.train.stage1.audio import AudioFeatures, AudioPredictions, predict_audio, train_audio_classifier
from echoshift.train.stage1.config import AudioClassifierConfig

N, N_CLASSES, CPU = 30, 3, torch.device("cpu")
IDS = [f"x{i:02d}" for i in range(N)]
LABELS = np.arange(N) % N_CLASSES
CONFIG = AudioClassifierConfig(lr=3e-3, n_epochs=6, batch=8)


def build_network() -> EncoderNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return find_encoder("resnet_demo").build()


def make_maps(labels: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Draw maps [n, 64, 4, 4] in which the channels of a segment's classes are loud."""
    maps = np.abs(np.random.default_rng(seed).standard_normal((len(labels), 64, 4, 4)))
    shown = labels if labels.ndim == 2 else np.eye(N_CLASSES)[labels]
    for k in range(N_CLASSES):
        maps[:, 20 * k : 20 * k + 20] += 3 * shown[:, k, None, None, None]
    return maps


def write(path: Path, maps: np.ndarray, has_audio: np.ndarray | None = None) -> AudioFeatures:
    path.mkdir(exist_ok=True)
    heard = np.ones(len(maps), bool) if has_audio is None else has_audio
    return tiny_encoder.write_sound(path, IDS[: len(maps)], maps, heard, pooled=np.zeros((len(maps), 128)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sound"), make_maps(LABELS))


def train(sound: AudioFeatures, labels: np.ndarray = LABELS, *, seed: int = 1, **changes: Any) -> Any:
    config = CONFIG.model_copy(update=changes)
    return train_audio_classifier(
        build_network(), sound, IDS[: len(labels)], labels, N_CLASSES, config, seed=seed, device=CPU
    )


def copy_state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_it_learns_sounds_that_tell_classes_apart(sound):
    model, losses = train(sound)
    assert len(losses) == CONFIG.n_epochs
    assert losses[-1] < 0.2 * losses[0]
    found = predict_audio(model, sound, IDS, multi_label=False, device=CPU)
    assert (found.probabilities.argmax(axis=1) == LABELS).all()
    assert np.allclose(found.probabilities.sum(axis=1), 1, atol=1e-5)
    assert found.features.shape == (N, 128)


def test_it_predicts_what_its_layers_say(sound):
    model, _ = train(sound, n_epochs=1)
    assert not model.training
    found = predict_audio(model, sound, IDS[:3], multi_label=False, device=CPU)
    with torch.no_grad():
        pooled = model.network.net.get_submodule("layer4")(sound.read_maps(IDS[:3])).mean(dim=(2, 3))
        expected = (pooled @ model.classifier.weight.T + model.classifier.bias).softmax(dim=1)
    assert np.allclose(found.features, pooled.numpy(), atol=1e-5)
    assert np.allclose(found.probabilities, expected.numpy(), atol=1e-5)


def test_what_is_frozen_keeps_its_bytes_and_the_network_given_is_untouched(sound):
    network = build_network()
    before = copy_state(network)
    model, _ = train_audio_classifier(network, sound, IDS, LABELS, N_CLASSES, CONFIG, seed=1, device=CPU)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    after = model.network.state_dict()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed and all(name.startswith("net.layer4.") for name in changed)
    trained = {name for name, p in network.named_parameters() if name.startswith("net.layer4.")}
    assert trained <= changed


def test_a_seed_decides_everything(sound):
    states = []
    for seed, drawn in ((1, 0), (1, 7), (2, 0)):
        torch.rand(drawn + 1)
        model, losses = train(sound, seed=seed, n_epochs=2)
        states.append((copy_state(model), losses))
    assert states[0][1] == states[1][1] != states[2][1]
    assert all(torch.equal(tensor, states[1][0][name]) for name, tensor in states[0][0].items())


def test_silent_rows_and_their_labels_count_for_nothing(sound, tmp_path):
    has_audio = np.arange(N) % 5 != 0
    models = []
    for name, change in (("as-they-are", 0), ("other", 1)):
        labels = np.where(has_audio, LABELS, (LABELS + change) % N_CLASSES)
        maps = np.where(has_audio[:, None, None, None], make_maps(LABELS), 1000.0 * change)
        part = write(tmp_path / name, maps, has_audio)
        models.append(train(part, labels, n_epochs=2)[0])
    own = copy_state(models[0])
    assert all(torch.equal(tensor, own[name]) for name, tensor in models[1].state_dict().items())
    found = predict_audio(models[0], part, IDS, multi_label=False, device=CPU)
    assert np.array_equal(found.has_audio, has_audio)
    assert np.isfinite(found.probabilities).all()


def test_several_labels_are_learned_each_by_itself(tmp_path):
    labels = (np.random.default_rng(2).random((N, N_CLASSES)) < 0.5).astype(np.float32)
    part = write(tmp_path, make_maps(labels))
    model, losses = train(part, labels, n_epochs=12)
    assert losses[0] == pytest.approx(np.log(2), abs=0.4)
    found = predict_audio(model, part, IDS, multi_label=True, device=CPU).probabilities
    assert ((found > 0.5) == (labels > 0.5)).mean() > 0.95
    assert not np.allclose(found.sum(axis=1), 1, atol=0.1)


@pytest.mark.parametrize(("n", "batch", "n_batches"), [(30, 8, 3), (9, 8, 1), (17, 8, 2), (3, 8, 1)])
def test_no_batch_has_a_single_segment(sound, monkeypatch, n, batch, n_batches):
    sizes: list[int] = []
    read = sound.read_maps

    def count(ids: Any) -> Tensor:
        sizes.append(len(ids))
        return read(ids)

    monkeypatch.setattr(sound, "read_maps", count)
    train(sound, LABELS[:n], n_epochs=1, batch=batch)
    assert sum(sizes) == n
    assert len(sizes) == n_batches
    assert min(sizes) > 1


@pytest.mark.parametrize("n_audible", [0, 1])
def test_without_sound_it_says_how_to_do_without(tmp_path, n_audible):
    part = write(tmp_path, make_maps(LABELS), np.arange(N) < n_audible)
    with pytest.raises(RunError, match=rf"{n_audible} of 30 source segments have any.*attention\.enabled=false"):
        train(part)


def test_predictions_come_back_as_they_were_written(tmp_path, sound):
    model, _ = train(sound, n_epochs=1)
    found = predict_audio(model, sound, IDS, multi_label=False, device=CPU)
    found.write(tmp_path / "predictions.npz")
    back = AudioPredictions.read(tmp_path / "predictions.npz")
    assert back.segment_ids == tuple(IDS)
    for name in ("probabilities", "features", "has_audio"):
        assert np.array_equal(getattr(back, name), getattr(found, name))
    chosen = back.select(["x05", "x02"])
    assert np.array_equal(chosen.probabilities, found.probabilities[[5, 2]])
    with pytest.raises(RunError, match="no prediction of segment nowhere; extract its features"):
        back.select(["x05", "nowhere"])
