"""Checks that the losses of train/alignment train Stage 1's networks end to end, with the values they should have."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_encoder
import torch
from safetensors.torch import load_file
from torch import Tensor

from echoshift.pipeline.errors import RunError
from echoshift.train.ranks import Ranks
from echoshift.train.runs import RESULTS, read_runs
from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage1.export import predict_segments

METHODS = ("rna", "hna", "align", "orth", "grl")
LABELS, DOMAINS = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 0])
N_SOURCE, WIDTH = 4, 7


def make_config(method: str, *, setting: str = "uda", **training: Any) -> Stage1Config:
    plain = tiny_encoder.make_config(**training)
    network = {"width": WIDTH, "dropout": 0.0}
    objective = {"enabled": True, "method": method, "setting": setting, "network": network}
    given = plain.model_dump() | {"objective": objective, "balance": {"kind": "none"}, "absent": {"weight": 0}}
    return Stage1Config.model_validate(given)


def make_inputs() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    clips = torch.randn(6, 3, 2, 6, 6, generator=draw)
    maps = torch.randn(6, *tiny_encoder.MAP, generator=draw)
    return {"clip": clips}, maps, torch.tensor([True] * 5 + [False])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny_encoder.write_sound(tmp_path_factory.mktemp("sound"), tiny_encoder.list_ids())


def compute_norms(model: Any, inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Compute |f^v| and |f^a| of every segment in NumPy, from what the two networks give."""
    tensors = {name: t.detach().numpy() for name, t in model.objective.method.streams.state_dict().items()}
    visual = model.compute_pooled(*inputs).detach().numpy()
    audio = model.objective.audio.network.features({"map": inputs[1]})["pooled"].detach().numpy()

    def project(values: np.ndarray, name: str) -> np.ndarray:
        projected = values @ tensors[f"project_{name}.weight"].T + tensors[f"project_{name}.bias"]
        return np.sqrt((np.maximum(projected, 0) ** 2).sum(axis=1))

    return project(visual, "visual"), project(audio, "audio")


def test_rna_is_the_squared_difference_of_the_norms_ratio_from_one():
    model, inputs = tiny_encoder.build(make_config("rna")).eval(), make_inputs()
    losses = model.objective.compute_losses(model.compute_pooled(*inputs), *inputs[1:], LABELS, DOMAINS, 0.0)
    of_visual, of_audio = compute_norms(model, inputs)
    source = (of_visual[:4].mean() / of_audio[:4].mean() - 1) ** 2
    target = (of_visual[4:].mean() / of_audio[4] - 1) ** 2  # the last segment is silent
    assert float(losses["RNA source"].detach()) == pytest.approx(source, rel=1e-4)
    assert float(losses["RNA target"].detach()) == pytest.approx(target, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_alignment_alone_moves_what_trains_of_both_networks(method):
    config = make_config(method)
    model, inputs = tiny_encoder.build(config).train(), make_inputs()
    losses = model.objective.compute_losses(model.compute_pooled(*inputs), *inputs[1:], LABELS, DOMAINS, 0.5)
    aligned = torch.stack([value for name, value in losses.items() if name != "class"]).sum()
    aligned.backward()
    moved = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert {"gated.network.top.0.weight", "objective.audio.network.layer4.0.weight"} <= moved
    assert not any("sound.network.stem" in name for name in moved)
    weight = model.gated.network.top[0].weight
    found = float(weight.grad.flatten()[0])
    assert found == pytest.approx(_measure_slope(model, inputs, weight), rel=0.05, abs=2e-5)


def _measure_slope(model: Any, inputs: Any, weight: Tensor, step: float = 1e-2) -> float:
    """Measure the slope of the alignment's terms by central differences; a reversed gradient has the other sign."""
    values = []
    factor = 1.0
    for sign in (1, -1):
        with torch.no_grad():
            weight.view(-1)[0] += sign * step
            losses = model.objective.compute_losses(model.compute_pooled(*inputs), *inputs[1:], LABELS, DOMAINS, 0.5)
            weight.view(-1)[0] -= sign * step
        values.append(sum(float(value) for name, value in losses.items() if name != "class"))
    if "domain visual" in model.objective.loss_names:
        factor = -(2 / (1 + np.exp(-10 * 0.5)) - 1) * 0.2
    return factor * (values[0] - values[1]) / (2 * step)


def test_an_interrupted_run_comes_to_what_an_uninterrupted_one_does(sound, tmp_path):
    config = make_config("grl", n_epochs=2)
    model, whole = tiny_encoder.train(tmp_path / "whole", config, sound)
    expected = {name: tensor.clone() for name, tensor in model.get_trained_tensors().items()}
    with pytest.raises(KeyboardInterrupt):
        tiny_encoder.train(tmp_path / "killed", config, sound, watcher=tiny_encoder.Watcher(stop_after=1))
    model, records = tiny_encoder.train(tmp_path / "killed", config, sound)
    assert [dict(record.losses) for record in records] == [dict(record.losses) for record in whole]
    assert set(records[0].losses) == {"class", "domain visual", "domain audio", "total"}
    found = model.get_trained_tensors()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(name.startswith("objective.sound.network.layer4") for name in expected)


def test_generalisation_reads_nothing_of_the_target(sound, tmp_path):
    asked: list[str] = []
    visual = tiny_encoder.MemoryInputs()
    draw = visual.draw
    visual.draw = lambda name, epoch: (asked.append(name), draw(name, epoch))[1]
    task = replace(tiny_encoder.make_task(), target_ids=(), absent=np.zeros((0, 3), dtype=bool))
    config = make_config("rna", setting="dg", n_epochs=1)
    _, records = tiny_encoder.train(tmp_path, config, sound, visual=visual, task=task)
    assert records[0].losses["RNA target"] == 0
    assert {name[0] for name in asked} == {"s", "v"}


def test_a_segment_is_predicted_by_summed_logits_of_its_clips_and_its_sound(sound):
    model, visual = tiny_encoder.build(make_config("rna")), tiny_encoder.MemoryInputs()
    ids = ["s0", "s3"]  # every fourth segment is silent
    spec = tiny_encoder.make_task().validation_spec
    found = list(
        predict_segments(model, visual.iterate_clips(ids, spec), sound, multi_label=False, device=tiny_encoder.CPU)
    )
    streams = model.objective.method.streams
    for prediction, is_heard in zip(found, (True, False), strict=True):
        ((_, clips, _),) = visual.iterate_clips([prediction.segment_id], spec)
        maps = sound.read_maps([prediction.segment_id])
        with torch.no_grad():
            pooled = model.gated.compute_pooled(clips, model.compute_gates(maps, torch.tensor([is_heard])))
            logits = streams.classify_visual(streams.project_visual(pooled).relu())
            if is_heard:
                heard = model.objective.audio.network.features({"map": maps})["pooled"]
                logits = logits + streams.classify_audio(streams.project_audio(heard).relu())
        wanted = logits.softmax(dim=1).mean(dim=0).numpy()
        np.testing.assert_allclose(prediction.probabilities, wanted, atol=1e-6)


def test_what_does_not_go_together_is_refused(sound, tmp_path):
    config = make_config("rna")
    with pytest.raises(ValueError, match=r"absent\.weight=0 and balance\.kind=none"):
        Stage1Config.model_validate(config.model_dump() | {"absent": {"weight": 1}})
    with pytest.raises(ValueError, match="run `echoshift align`"):
        make_config("planamente_rerun")
    with pytest.raises(RunError, match="trains in one process"):
        tiny_encoder.train(tmp_path, config, sound, ranks=Ranks(0, 2))


def test_stage1_trains_and_scores_with_an_objective(copied):
    settings = ("objective.enabled=true", "objective.method=rna", "objective.setting=uda", "absent.weight=0",
                "balance.kind=none", "objective.network.width=8")  # fmt: skip
    before = set(copied.list_records())
    code, out, err = copied.stage1(settings=settings)
    assert code == 0, err
    (folder,) = (copied.steps / name for name in copied.list_records().keys() - before if name.startswith("encoder"))
    losses = json.loads((folder / "record.json").read_text())["outcome"]["epochs"][0]["losses"]
    assert set(losses) == {"class", "RNA source", "RNA target", "total"}
    tensors = load_file(folder / "encoder.safetensors")
    assert tensors["objective.method.streams.project_audio.weight"].shape[0] == 8
    config = read_runs(copied.runs / "tiny" / RESULTS)[-1].config
    assert config["objective"]["method"] == "rna"
    assert "s-t" in out
