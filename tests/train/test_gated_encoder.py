"""Checks the gated encoder against the plain network, and what training may and may not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.extract.encoders.registry import find_encoder
from echoshift.pipeline.errors import SpecError, WeightsError
from echoshift.train.stage1.encoder import AudioAdaptiveEncoder, GatedEncoder

_CLIPS = {"slowfast_demo": (2, 3, 8, 32, 32), "i3d_rgb": (2, 3, 8, 32, 32)}
_N_CLASSES = 5


def build_network(name: str = "slowfast_demo") -> EncoderNetwork:
    """Build a network whose norms do something, from one seed."""
    torch.manual_seed(0)
    network = find_encoder(name).build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


def build_encoder(name: str = "slowfast_demo", **options: object) -> GatedEncoder:
    network = build_network(name)
    torch.manual_seed(1)
    return GatedEncoder(network, _N_CLASSES, **options)


def make_clip(name: str = "slowfast_demo") -> Tensor:
    return torch.randn(_CLIPS[name], generator=torch.Generator().manual_seed(2))


def make_gates(encoder: GatedEncoder, n: int, value: float | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(n, c, generator=generator) if value is None else torch.full((n, c), value)
        for name, c in encoder.gate_channels.items()
    }


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def step_once(encoder: GatedEncoder, gates: dict[str, Tensor] | None = None) -> None:
    """Make one step of plain descent with weight decay, which would move any weight that it is given."""
    optimiser = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    nn.functional.cross_entropy(encoder({"clip": make_clip()}, gates), torch.tensor([1, 3])).backward()
    optimiser.step()


@pytest.mark.parametrize("name", _CLIPS)
def test_gates_of_one_leave_the_plain_networks_features(name):
    network = build_network(name).eval()
    encoder = build_encoder(name).eval()
    clip = make_clip(name)
    names = [n for n in network.head_names if n != "logits"]
    with torch.inference_mode():
        wanted = network(clip, names)
    for gates in (None, make_gates(encoder, 2, 1.0), make_gates(encoder, 1, 1.0)):
        found = encoder.encode({"clip": clip}, gates, [*names, "logits"])
        assert list(found) == [*names, "logits"]
        for key in names:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-5)
        linear = encoder.classifier[1]
        by_hand = found[network.classified_output] @ linear.weight.T + linear.bias
        torch.testing.assert_close(found["logits"], by_hand)
        torch.testing.assert_close(encoder({"clip": clip}, gates), by_hand)


@pytest.mark.parametrize("name", _CLIPS)
def test_gates_multiply_the_trunks_channels(name):
    network = build_network(name).eval()
    encoder = build_encoder(name).eval()
    clip, gates = make_clip(name), make_gates(encoder, 2)
    with torch.inference_mode():
        trunk = {key: value * gates[key][:, :, None, None, None] for key, value in network.trunk(clip).items()}
        wanted = network.features(trunk)["pooled"]
    for visual in ({"clip": clip}, network.trunk(clip)):
        found = encoder.encode(visual, gates, ["pooled"])["pooled"]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_zeros_on_one_path_silence_that_path_alone():
    network = build_network().eval()
    encoder = build_encoder().eval()
    clip = make_clip()
    n_slow = 32 * 16  # the slow channels after res5
    with torch.inference_mode():
        plain = network(clip, ["pooled_avg"])["pooled_avg"]
        trunk = network.trunk(clip)
        empty = network.features({key: torch.zeros_like(value) for key, value in trunk.items()})["pooled_avg"]
    for path, own in (("trunk_slow", slice(0, n_slow)), ("trunk_fast", slice(n_slow, None))):
        gates = make_gates(encoder, 2, 1.0) | {path: torch.zeros(2, encoder.gate_channels[path])}
        found = encoder.encode({"clip": clip}, gates, ["pooled_avg"])["pooled_avg"]
        wanted = plain.clone()
        wanted[:, own] = empty[:, own]
        assert not torch.allclose(plain[:, own], empty[:, own], atol=1e-3)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize(
    ("trainable_from", "trained"),
    [
        ("split", {"res5"}),
        ("res4", {"res4", "res5"}),
        ("stem", {"stem", "res2", "res3", "res4", "res5"}),
        ("classifier", set()),
    ],
)
def test_a_step_changes_what_trains_and_nothing_else(trainable_from, trained, batch_norm):
    encoder = build_encoder(trainable_from=trainable_from, batch_norm=batch_norm).train()
    before = copy_state(encoder)
    gates = {name: gate.requires_grad_() for name, gate in make_gates(encoder, 2).items()}
    step_once(encoder, gates)
    assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in gates.values())
    buffers = {name for name, _ in encoder.named_buffers()}
    moved, wanted = set(), set()
    for name, value in encoder.state_dict().items():
        stage = "own" if name.startswith("classifier") else encoder.network.find_stage(name.removeprefix("network."))
        if not torch.equal(value, before[name]):
            moved.add(name)
        is_frozen_norm = name in buffers and batch_norm == "train" and stage != "classifier"
        if stage in trained | {"own"} or is_frozen_norm:
            wanted.add(name)
        if stage not in trained | {"own"} and name not in buffers:
            assert encoder.get_parameter(name).grad is None
    assert moved == wanted
    assert set(encoder.trainable_state()) == wanted
    assert not any(name.startswith("network.blocks.6") for name in wanted)  # the Kinetics classifier


def test_frozen_norms_use_the_statistics_that_are_said():
    clip, network = make_clip(), build_network()
    wanted = {"eval": network.eval().trunk(clip), "train": network.train().trunk(clip)}  # the second one moves them
    assert not torch.allclose(wanted["train"]["trunk_slow"], wanted["eval"]["trunk_slow"], atol=1e-2)
    for mode, trunk in wanted.items():
        encoder = build_encoder(batch_norm=mode).train()
        for key, value in encoder.compute_trunk({"clip": clip}).items():
            torch.testing.assert_close(value, trunk[key], rtol=1e-4, atol=1e-4)
        still = build_encoder(batch_norm=mode).eval()
        for key, value in still.compute_trunk({"clip": clip}).items():
            torch.testing.assert_close(value, wanted["eval"][key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_what_was_trained_comes_back(batch_norm):
    trained = build_encoder(batch_norm=batch_norm).train()
    step_once(trained)
    saved = {name: value.clone() for name, value in trained.trainable_state().items()}
    fresh = build_encoder(batch_norm=batch_norm).eval()
    visual = {"clip": make_clip()}
    fresh(visual)  # makes the trunk's inference form
    AudioAdaptiveEncoder(fresh, None).load_trained_tensors({f"visual.{n}": t for n, t in saved.items()}, "it")
    assert torch.equal(fresh(visual), trained.eval()(visual))
    assert all(torch.equal(value, saved[name]) for name, value in fresh.trainable_state().items())
    n_stored, n_all = (sum(v.numel() for v in s.values()) for s in (saved, fresh.state_dict()))
    assert n_stored < n_all


def test_a_checkpoint_that_does_not_fit_is_refused():
    encoder = AudioAdaptiveEncoder(build_encoder(), None)
    state = encoder.get_trained_tensors()
    with pytest.raises(WeightsError, match=r"has visual\.classifier\.1\.weight as .*\[2, 4\], not .*\[5, 576\]"):
        encoder.load_trained_tensors(state | {"visual.classifier.1.weight": torch.zeros(2, 4)}, "a")
    with pytest.raises(WeightsError, match=r"a doesn't fit: it lacks visual\.classifier\.1\.bias"):
        encoder.load_trained_tensors({k: v for k, v in state.items() if k != "visual.classifier.1.bias"}, "a")
    with pytest.raises(WeightsError, match="has more, which the network hasn't"):
        encoder.load_trained_tensors(state | {"more": torch.zeros(1)}, "a")


def test_a_whole_state_that_is_loaded_reaches_the_inference_form():
    encoder, visual = build_encoder().eval(), {"clip": make_clip()}
    before = encoder(visual)
    state = copy_state(encoder)
    state["network.blocks.0.multipathway_blocks.0.conv.weight"] *= 2
    encoder.load_state_dict(state)
    assert not torch.allclose(encoder(visual), before)


def test_autocast_reaches_the_frozen_trunk_and_logits_stay_float32():
    encoder, visual = build_encoder().train(), {"clip": make_clip()}
    plain = encoder.eval()(visual)
    with torch.autocast("cpu", torch.bfloat16):
        trunk = encoder.compute_trunk(visual)
        logits = encoder(visual, make_gates(encoder, 2, 1.0))
    assert {x.dtype for x in trunk.values()} == {torch.bfloat16} and logits.dtype == torch.float32
    torch.testing.assert_close(logits, plain, rtol=0.1, atol=0.02)
    assert not torch.equal(logits, plain)


def test_impossible_wishes_are_told():
    stages = "it has split (= res5), stem, res2, res3, res4, res5, classifier"
    with pytest.raises(SpecError) as caught:
        build_encoder(trainable_from="res6")
    assert str(caught.value) == f"trainable_from: SlowFast has no stage 'res6'; {stages}"
    encoder, clip = build_encoder(), make_clip()
    trunk = encoder.network.trunk(clip)
    with pytest.raises(SpecError, match=r"weights train from res4 on, before the split at res5; use visual\.mode"):
        build_encoder(trainable_from="res4")(trunk)
    with pytest.raises(SpecError, match="where its BatchNorm can't train"):
        build_encoder(batch_norm="train")(trunk)
    with pytest.raises(SpecError, match="the encoder takes clip, or trunk_slow, trunk_fast"):
        encoder({"trunk": clip})
    with pytest.raises(SpecError, match="gates for trunk; the network takes some for trunk_slow, trunk_fast"):
        encoder(trunk, {"trunk": torch.ones(2, 3)})
    with pytest.raises(SpecError, match=r"a gate of \[2, 3\] doesn't fit"):
        encoder(trunk, make_gates(encoder, 2) | {"trunk_fast": torch.ones(2, 3)})
    with pytest.raises(SpecError, match="the head of SlowFast has no output 'trunk_slow'"):
        encoder.encode(trunk, None, ["trunk_slow"])
