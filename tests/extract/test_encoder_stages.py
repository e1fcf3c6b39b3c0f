"""Checks that each encoder's stages divide its weights, and that what they promise of its outputs holds."""

from __future__ import annotations

import pytest
import torch

from echoshift.extract.encoders.registry import ENCODERS, find_encoder
from echoshift.pipeline.errors import SpecError

_SPLITS = {"slowfast": "res5", "slowonly": "res5", "i3d": "Mixed_5b", "resnet": "layer4", "resnet18": "layer4",
           "bninception": "inception_4e"}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_stages_hold_every_weight_once_and_in_order(name: str) -> None:
    with torch.device("meta"):
        network = find_encoder(name).build()
    stages = list(network.stages)
    assert stages[-1] == "classifier" and network.split_stage == _SPLITS[name.split("_")[0]]
    numbers = []
    for weight in network.state_dict():
        holders = [s for s, prefixes in network.stages.items() if any(weight.startswith(f"{p}.") for p in prefixes)]
        assert len(holders) == 1, (weight, holders)
        assert network.find_stage(weight) == holders[0]
        numbers.append(stages.index(holders[0]))
    assert numbers == sorted(numbers) and set(numbers) == set(range(len(stages)))
    with pytest.raises(SpecError, match=f"no stage for 'nothing'; there are {stages[0]}, "):
        network.find_stage("nothing")


_INPUTS = {
    "slowfast_demo": (1, 3, 8, 64, 64),
    "slowonly_r50_flow": (1, 2, 4, 32, 32),
    "i3d_rgb": (1, 3, 9, 33, 33),
    "resnet_demo": (1, 1, 65, 80),
    "bninception_audio": (1, 1, 65, 80),
}


@pytest.mark.parametrize("name", _INPUTS)
def test_the_split_stage_begins_the_head_and_the_classifier_sees_what_is_said(name: str) -> None:
    torch.manual_seed(0)
    network = find_encoder(name).build().eval().requires_grad_(False)
    x = torch.randn(_INPUTS[name])
    stages = list(network.stages)
    trunk = network.trunk(x)
    assert network.trunk_channels == {key: value.shape[1] for key, value in trunk.items()}
    features = network.features(trunk)
    whole = network.head(trunk)
    assert list(whole) == list(network.head_names) and list(features) == [n for n in whole if n != "logits"]
    assert all(torch.equal(features[key], whole[key]) for key in features)
    assert features[network.classified_output].shape == (1, network.n_classified)
    saved = {key: value.clone() for key, value in network.state_dict().items()}
    for stage in stages:
        for module in network.iterate_stage_modules(stage):
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
        moved = any(not torch.equal(value, trunk[key]) for key, value in network.trunk(x).items())
        assert moved == (stages.index(stage) < stages.index(network.split_stage)), stage
        moved = not torch.equal(network.features(trunk)[network.classified_output], features[network.classified_output])
        assert moved == (stages.index(network.split_stage) <= stages.index(stage) < len(stages) - 1), stage
        network.load_state_dict(saved)
