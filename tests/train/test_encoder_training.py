"""Checks the encoder's training: going on after a kill, batches in parts, precision, faults, and several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoder
import torch
from safetensors.torch import load_file
from torch import Tensor

from echoshift.pipeline.errors import RunError
from echoshift.train.ranks import Ranks
from echoshift.train.stage1.training import STATE


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny_encoder.write_sound(tmp_path_factory.mktemp("sound"), tiny_encoder.list_ids())


def copy_tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.get_trained_tensors().items()}


def list_losses(records: list[Any]) -> list[tuple[int, dict[str, float], float | None]]:
    return [(record.epoch, dict(record.losses), record.validation) for record in records]


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ("plain", {}),
        ("normed", {"n_accumulated": 2}),
        ("slowfast_demo", {"trainable_from": "split", "batch_norm": "train", "n_epochs": 2}),
    ],
)
def test_an_interrupted_run_comes_to_what_an_uninterrupted_one_does(sound, tmp_path, network, changes):
    config = tiny_encoder.make_config(dropout=0.3, **changes)
    visual = tiny_encoder.MemoryInputs((3, 8, 32, 32)) if network == "slowfast_demo" else None
    if network == "plain":  # with views of audio, which a killed run must draw alike
        ids = tiny_encoder.list_ids()
        views = np.random.default_rng(7).standard_normal((len(ids), 3, *tiny_encoder.MAP))
        sound = tiny_encoder.write_sound(tmp_path, ids, views=views)
    common = {"network": network, "visual": visual, "task": tiny_encoder.make_task(n_labelled=3)}
    model, whole = tiny_encoder.train(tmp_path / "whole", config, sound, **common)
    expected = copy_tensors(model)
    for n_done in range(config.training.n_epochs):
        folder = tmp_path / f"after-{n_done}"
        with pytest.raises(KeyboardInterrupt):
            tiny_encoder.train(folder, config, sound, watcher=tiny_encoder.Watcher(stop_after=n_done), **common)
        assert (folder / STATE).is_file() == (n_done > 0)
        torch.rand(n_done + 1)  # another process stands elsewhere in torch's row of numbers
        watcher = tiny_encoder.Watcher()
        model, records = tiny_encoder.train(folder, config, sound, watcher=watcher, **common)
        assert len(watcher.said) == config.training.n_epochs - n_done, "what is done isn't done again"
        for ours, theirs in zip(list_losses(records), list_losses(whole), strict=True):
            assert ours[0] == theirs[0]
            assert ours[1] == pytest.approx(theirs[1], abs=1e-6)
            assert ours[2] == theirs[2]
        found = copy_tensors(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_loss_falls_where_there_is_something_to_learn(sound, tmp_path):
    config = tiny_encoder.make_config(n_epochs=25, validate_every=0)
    visual = tiny_encoder.MemoryInputs()
    visual.draw = lambda name, epoch: torch.full(visual.shape, float(int(name[1:]) % 3 - 1))
    _, records = tiny_encoder.train(tmp_path, config, sound, visual=visual)
    first, last = records[0].losses, records[-1].losses
    assert last["source"] < 0.5 * first["source"]
    assert all(r.losses["total"] == pytest.approx(r.losses["source"] + 0.5 * r.losses["absent"]) for r in records)


@pytest.mark.parametrize("n_target", [4, 3, 1])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(sound, tmp_path, n_target):
    gradients = []
    task = tiny_encoder.make_task(n_source=4, n_labelled=3)
    for n_parts in (1, 2):
        config = tiny_encoder.make_config(n_accumulated=n_parts, n_target=n_target, n_labelled=3, n_epochs=1)
        model, records = tiny_encoder.train(tmp_path / str(n_parts), config, sound, task=task)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        gradients[-1]["losses"] = torch.tensor([records[0].losses[n] for n in ("source", "absent", "labelled")])
    assert gradients[0].keys() == gradients[1].keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_bf16_trains_near_fp32(sound, tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        config = tiny_encoder.make_config(precision=precision, n_epochs=2)
        model, records = tiny_encoder.train(tmp_path / precision, config, sound)
        assert {tensor.dtype for tensor in model.get_trained_tensors().values()} == {torch.float32}
        losses.append([record.losses["total"] for record in records])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


def test_a_loss_that_is_no_number_names_batch_and_epoch(sound, tmp_path):
    visual = tiny_encoder.MemoryInputs()
    draw = visual.draw
    visual.draw = lambda name, epoch: draw(name, epoch) * (float("inf") if (name, epoch) == ("s0", 1) else 1)
    with pytest.raises(RunError, match=r"the loss is nan in batch [01] of epoch 1; lower training\.lr"):
        tiny_encoder.train(tmp_path, tiny_encoder.make_config(), sound, visual=visual)
    state = torch.load(tmp_path / STATE, weights_only=True)
    assert len(state["records"]) == 1
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_weights_that_overflow_in_the_last_step_are_an_error(sound, tmp_path, monkeypatch):
    """No loss of the epoch shows it, since the last batch's is computed before its step."""
    config = tiny_encoder.make_config(n_epochs=1, n_source=8, validate_every=0)
    step = torch.optim.Adam.step

    def overflow(self: torch.optim.Adam, *arguments: Any) -> Any:
        step(self, *arguments)
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(float("inf"))

    monkeypatch.setattr(torch.optim.Adam, "step", overflow)
    with pytest.raises(RunError, match=r"visual\.network\.stem\.0\.weight isn't finite after epoch 0"):
        tiny_encoder.train(tmp_path, config, sound)
    assert not (tmp_path / STATE).exists()


def test_a_damaged_state_says_what_to_delete(sound, tmp_path):
    (tmp_path / STATE).write_bytes(b"half a file")
    with pytest.raises(RunError, match=r"isn't a whole training state.*delete it"):
        tiny_encoder.train(tmp_path, tiny_encoder.make_config(), sound)


def test_tensorboard_has_every_epoch_once_though_a_run_was_killed(sound, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_encoder.make_config(n_epochs=4, validate_every=2)
    with pytest.raises(KeyboardInterrupt):
        tiny_encoder.train(tmp_path, config, sound, watcher=tiny_encoder.Watcher(stop_after=2))
    _, records = tiny_encoder.train(tmp_path, config, sound)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss/source", "loss/absent", "loss/total", "validation/source"}
    for name in ("source", "absent", "total"):
        written = [(event.step, event.value) for event in events.Scalars(f"loss/{name}")]
        assert [step for step, _ in written] == [0, 1, 2, 3]
        assert [value for _, value in written] == pytest.approx([r.losses[name] for r in records], rel=1e-5)
    validated = [(event.step, event.value) for event in events.Scalars("validation/source")]
    assert [step for step, _ in validated] == [1, 3]
    assert [r.validation is not None for r in records] == [False, True, False, True]
    assert [value for _, value in validated] == pytest.approx([records[1].validation, records[3].validation])


def test_validation_is_the_accuracy_of_the_mean_over_clips(sound, tmp_path):
    config = tiny_encoder.make_config(n_epochs=1)
    task, visual = tiny_encoder.make_task(), tiny_encoder.MemoryInputs()
    model, records = tiny_encoder.train(tmp_path, config, sound, task=task)
    model.eval()
    hits = []
    for i, segment in enumerate(task.source_val.segments):
        name = segment.segment_id
        clips = torch.stack([visual.draw(name, -1), visual.draw(name, -2)])
        audio, heard = sound.read_maps([name, name]), torch.from_numpy(sound.has_audio([name, name]))
        with torch.no_grad():
            guess = model({"clip": clips}, audio, heard).softmax(1).mean(0).argmax()
        hits.append(int(guess) == i % 3)
    assert records[0].validation == pytest.approx(np.mean(hits))


def test_a_batch_too_small_for_the_processes_is_an_error(sound, tmp_path):
    with pytest.raises(RunError, match="a batch of 4 source segments can't be shared among 5 processes"):
        tiny_encoder.train(tmp_path, tiny_encoder.make_config(), sound, ranks=Ranks(0, 5, 0))


def start_ranks(script: Path, out: Path, n_source: int, n_ranks: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), *sys.path])
    common = {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": path}
    command = [sys.executable, str(script), str(out), str(n_source)]
    running = [
        subprocess.Popen(
            command, env=os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE
        )
        for r in range(n_ranks)
    ]
    try:
        for process in running:
            _, err = process.communicate(timeout=200)
            assert process.returncode == 0, err.decode()
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("n_source", [4, 3])
def test_two_processes_train_what_one_does(sound, tmp_path, n_source):
    start_ranks(Path(tiny_encoder.__file__), tmp_path, n_source, 2)
    config = tiny_encoder.make_config(n_source=n_source, n_epochs=2)
    task = tiny_encoder.make_task(n_labelled=3)
    model, records = tiny_encoder.train(tmp_path / "alone", config, sound, task=task)
    expected = copy_tensors(model)
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    losses = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert losses[0] == losses[1]
    for record, found in zip(records, losses[0], strict=True):
        assert found == pytest.approx(dict(record.losses), abs=1e-5)
    start = copy_tensors(tiny_encoder.build(config))
    assert any((start[name] - expected[name]).abs().max() > 1e-3 for name in expected), "something was learned"
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_no_target_and_no_labels_train_on_the_source_alone(sound, tmp_path):
    task = replace(tiny_encoder.make_task(), target_ids=(), absent=np.zeros((0, 3), bool))
    _, records = tiny_encoder.train(tmp_path, tiny_encoder.make_config(n_epochs=1), sound, task=task)
    assert records[0].losses["absent"] == 0
    assert records[0].losses["total"] == records[0].losses["source"] > 0
