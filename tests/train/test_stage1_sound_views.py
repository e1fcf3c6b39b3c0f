"""Checks that training, and nothing else, hears augmented views of sound, and that without them nothing changes."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import tiny_encoder
import tiny_shift
import torch
import torch.nn.functional as F

from echoshift.pipeline.errors import RunError
from echoshift.pipeline.store.location import locate
from echoshift.pipeline.store.open import list_stores, open_store
from echoshift.train.runs import RESULTS, read_runs
from echoshift.train.stage1.audio import AudioClassifier, AudioFeatures, predict_audio, train_audio_classifier
from echoshift.train.stage1.config import AudioClassifierConfig
from echoshift.train.stage1.export import predict_segments
from echoshift.train.stage2.inputs import find_cached

IDS = [f"x{i:02d}" for i in range(12)]
LABELS = np.arange(12) % 3
CPU = torch.device("cpu")
DEPENDS_ON_SOUND = {
    "audio_classifier", "audio_predictions", "clusters", "absent_labels", "encoder", "predictions", "features", "table",
    "scores",
}  # fmt: skip


def draw_by_hand(name: str, seed: int, epoch: int, n_views: int) -> int:
    """Draw a segment's view of an epoch from hashlib alone."""
    of_epoch = int.from_bytes(blake2b(f"{seed}\n{epoch}".encode(), digest_size=6).digest(), "big")
    drawn = blake2b(f"{of_epoch}\n{name}\n0\n0\nview of sound".encode(), digest_size=8).digest()
    return int(int.from_bytes(drawn, "big") / 2**64 * n_views)


def write_views(path: Path, ids: list[str], views: np.ndarray) -> AudioFeatures:
    """Write maps that are drawn, the same whatever the views, beside the maps of these views."""
    path.mkdir(exist_ok=True)
    return tiny_encoder.write_sound(path, ids, views=views)


def remove_store(path: Path) -> None:
    """Remove a store from the cache that tests share."""
    shutil.rmtree(path)
    for beside in path.parent.glob(f"{path.name}.*"):
        beside.unlink()


def test_the_view_is_drawn_by_seed_epoch_and_segment_and_nothing_else_is_read(tmp_path, monkeypatch):
    views = np.random.default_rng(7).standard_normal((12, 3, *tiny_encoder.MAP)).astype(np.float32)
    clean = tiny_encoder.write_sound(tmp_path, IDS)
    sound = write_views(tmp_path / "views", IDS, views)
    heard = sound.has_audio(IDS)
    assert torch.equal(sound.read_maps(IDS), clean.read_maps(IDS))
    assert np.array_equal(sound.read_pooled(IDS), clean.read_pooled(IDS))
    maps = np.concatenate([clean.read_maps(IDS).numpy()[:, None], views], axis=1) * heard[:, None, None, None, None]
    monkeypatch.delattr(type(sound._store), "read")  # all views of a segment
    counts: Counter[int] = Counter()
    for seed, epoch in ((0, 0), (0, 1), (3, 0), *((9, epoch) for epoch in range(60))):
        drawn = [draw_by_hand(name, seed, epoch, 4) for name in IDS]
        counts.update(drawn)
        assert np.array_equal(sound.draw_maps(IDS, seed, epoch).numpy(), maps[np.arange(12), drawn])
        assert torch.equal(sound.draw_maps(IDS[5:3:-1], seed, epoch), sound.draw_maps(IDS, seed, epoch)[[5, 4]])
    assert set(counts) == {0, 1, 2, 3} and min(counts.values()) > 140  # of 189 each
    assert torch.equal(clean.draw_maps(IDS, 5, 1), clean.read_maps(IDS))


def test_the_audio_classifier_learns_from_the_views_that_are_drawn(tmp_path):
    views = 5 * np.random.default_rng(7).standard_normal((12, 2, *tiny_encoder.MAP)).astype(np.float32)
    sound = write_views(tmp_path, IDS, views)
    config = AudioClassifierConfig(lr=1e-4, n_epochs=1, batch=12)
    network = tiny_encoder.TinySound()
    network.net = torch.nn.Module()
    network.net.layer4 = network.layer4
    _, losses = train_audio_classifier(network, sound, IDS, LABELS, 3, config, seed=4, device=CPU)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        untrained = AudioClassifier(network, tiny_encoder.N_POOLED, 3).train()
    heard = np.flatnonzero(sound.has_audio(IDS))
    maps = np.concatenate([sound.read_maps(IDS).numpy()[:, None], views], axis=1)
    shown = np.stack([maps[i, draw_by_hand(IDS[i], 4, 0, 3)] for i in heard])
    with torch.no_grad():
        logits, _ = untrained(torch.from_numpy(shown))
    assert losses[0] == pytest.approx(float(F.cross_entropy(logits, torch.from_numpy(LABELS[heard]))), rel=1e-5)


@pytest.fixture
def poisoned(tmp_path):
    ids = tiny_encoder.list_ids()
    return write_views(tmp_path / "poisoned", ids, np.full((len(ids), 3, *tiny_encoder.MAP), np.nan))


def test_training_alone_hears_what_is_augmented(tmp_path, poisoned):
    ids = tiny_encoder.list_ids()
    clean = tiny_encoder.write_sound(tmp_path, ids)
    config = tiny_encoder.make_config(n_epochs=1)
    with pytest.raises(RunError, match="the loss is nan in batch 0 of epoch 0"):
        tiny_encoder.train(tmp_path / "on", config, poisoned)
    model, records = tiny_encoder.train(tmp_path / "off", config, clean)
    names, spec = tiny_encoder.name_segments("v", 3), tiny_encoder.make_task().validation_spec
    predicted = []
    for sound in (clean, poisoned):
        clips = tiny_encoder.MemoryInputs().iterate_clips(names, spec)
        found = list(predict_segments(model, clips, sound, multi_label=False, device=CPU))
        predicted.append(np.stack([prediction.probabilities for prediction in found]))
    assert np.isfinite(predicted[0]).all() and predicted[0].tobytes() == predicted[1].tobytes()
    assert records[0].validation is not None
    network = tiny_encoder.TinySound()
    network.net = torch.nn.Module()
    network.net.layer4 = network.layer4
    classifier = AudioClassifier(network, tiny_encoder.N_POOLED, 3).eval()
    heard = [predict_audio(classifier, sound, ids, multi_label=False, device=CPU) for sound in (clean, poisoned)]
    assert np.isfinite(heard[1].probabilities).all()
    assert heard[0].probabilities.tobytes() == heard[1].probabilities.tobytes()
    assert heard[0].features.tobytes() == heard[1].features.tobytes()


def test_the_encoder_draws_anew_in_each_epoch(tmp_path):
    ids, config = tiny_encoder.list_ids(), tiny_encoder.make_config(n_epochs=2)
    drawn = np.array([[draw_by_hand(name, 3, epoch, 4) for epoch in range(2)] for name in ids])  # tiny_encoder's seed
    number = np.arange(1, 4)
    is_first, is_second = (drawn[:, epoch, None] == number for epoch in range(2))
    for name, poisoned in (("never", ~is_first & ~is_second), ("second", is_second & ~is_first)):
        assert poisoned.any(axis=1).sum() > len(ids) / 2
        views = np.where(poisoned[:, :, None, None, None], np.nan, np.ones((1, 1, *tiny_encoder.MAP)))
        sound = write_views(tmp_path / name, ids, views)
        if name == "never":
            assert len(tiny_encoder.train(tmp_path / f"on-{name}", config, sound)[1]) == 2
        else:
            with pytest.raises(RunError, match="the loss is nan in batch 0 of epoch 1"):
                tiny_encoder.train(tmp_path / f"on-{name}", config, sound)


def test_stage_1_extracts_views_trains_on_them_and_leaves_done_runs_done(copied):
    before = copied.list_records()
    code, _, err = copied.stage1(settings=["sound.n_views=1"])
    assert code == 0 and copied.list_records() == before, err
    code, _, err = copied.stage1(settings=["sound.n_views=3"])
    assert code == 0, err
    fresh = {name.rpartition("-")[0] for name in copied.list_records().keys() - before.keys()}
    assert fresh == DEPENDS_ON_SOUND and set(before) <= set(copied.list_records())
    clean, views = sorted(
        (store for path in list_stores(copied.root / "cache") if (store := open_store(path)).spec.audio is not None),
        key=lambda store: store.layout.n_clips,
    )
    assert (clean.layout.n_clips, views.layout.n_clips, views.spec.audio.noise) == (1, 3, 0.05)
    for output in ("map", "pooled"):
        assert views.read(clean.segment_ids, output)[:, :1].tobytes() == clean.read_all(output).tobytes()
    records = read_runs(copied.runs / "tiny" / RESULTS)
    assert [record.config["sound"].get("n_views") for record in records] == [None, 3]
    clusters = [np.load(copied.steps / f"clusters-{r.steps['clusters']}" / "clusters.npy") for r in records]
    assert np.array_equal(*clusters), "clusters are of clean sound"
    losses = [
        json.loads((copied.steps / f"audio_classifier-{r.steps['audio_classifier']}" / "record.json").read_text())
        for r in records
    ]
    assert losses[0]["outcome"]["losses"] != losses[1]["outcome"]["losses"]
    remove_store(Path(views.path))


def test_views_that_are_nowhere_are_an_error_with_the_options_that_make_them(finished, tmp_path):
    tiny = finished.with_runs(tmp_path)
    arguments = tiny.list_arguments("stage1", "tiny", "--shift", "s-t", settings=["sound.n_views=2"])
    where = arguments.index("--media")
    del arguments[where : where + 2]
    code, _, err = tiny_shift.run(*arguments)
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert ", or say with --media where its media lie, or train on clean audio with sound.n_views=1" in err
    (path,) = re.findall(r"and no store (\S+);", err)
    (options,) = re.findall(r"extract tiny with (--encoders resnet_demo .*?), or say", err)
    assert not Path(path).exists()
    places = ["--media", tiny.media, "--cache", tiny.root / "cache", "--manifests", tiny.root, "--device", "cpu"]
    code, _, err = tiny_shift.run("extract", "tiny", *places, *options.split())
    assert code == 0 and Path(path).is_dir(), err
    remove_store(Path(path))


def test_views_are_asked_for_as_a_setting_of_stage_1(finished, tmp_path):
    tiny = finished.with_runs(tmp_path)
    for override in ("audio.n_views=4", "resnet_demo.audio.n_views=4"):
        code, _, err = tiny.stage1(settings=[f'sound.overrides=["{override}"]'])
        assert code == 2 and f"override '{override}': say it as sound.n_views" in err, err


def test_cached_sound_is_the_clean_store_where_there_are_views_beside_it(tmp_path):
    views = np.zeros((3, 1, *tiny_encoder.MAP))
    write_views(tmp_path / "b", IDS[:3], views)
    found = find_cached(locate(tmp_path), "tiny", "resnet_demo", "resnet_demo")
    assert found.sound == tmp_path / "b" / "resnet_demo.zarr"
    tiny_encoder.write_sound(tmp_path / "a", IDS[:3])
    found = find_cached(locate(tmp_path), "tiny", "resnet_demo", "resnet_demo")
    assert found.sound == tmp_path / "a" / "resnet_demo.zarr"
    write_views(tmp_path / "a2", IDS[:3], views)
    assert find_cached(locate(tmp_path), "tiny", "resnet_demo", "resnet_demo") == found
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(RunError, match=r"wanted from one store, and .* has 2: "):
        find_cached(locate(tmp_path), "tiny", "resnet_demo", "resnet_demo")
