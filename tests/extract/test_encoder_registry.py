"""Tests the list of encoders: one file an encoder, specifications, shapes of outputs, stages and messages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from echoshift.extract import encoders
from echoshift.extract.encoders.network import compute_outputs, require_trunk
from echoshift.extract.encoders.registry import find_encoder, list_builtin_encoders, list_encoders
from echoshift.extract.recipes import plan_spectrogram_shape
from echoshift.pipeline.errors import PluginError, SpecError
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FrameSpec

ENCODERS = list_builtin_encoders()
_SPLITS = {"slowfast": "res5", "slowonly": "res5", "i3d": "Mixed_5b", "resnet": "layer4", "resnet18": "layer4",
           "bninception": "inception_4e"}  # fmt: skip
_PARAMETERS = {
    # mmaction2's metafile.yml; PyTorchVideo's model zoo says 34.57 M and 62.83 M.
    "slowfast_r50_mmaction": 34_565_560,
    "slowfast_r101_mmaction": 62_912_312,
    "slowonly_r50_flow": 32_450_960,
    "slowfast_r50": 34_566_488,
    "slowfast_r101": 62_826_968,
    # pytorchcv's table says 11,295,240 with three input channels: 64 filters of 7 x 7 more, twice.
    "bninception_audio": 11_295_240 - 2 * 64 * 49,
}
_SMALL = [name for name in ENCODERS if "r101" not in name and name != "slowfast_r50"]


def _small_input(name: str) -> tuple[ClipSpec, FrameSpec | AudioSpec, torch.Tensor]:
    entry = find_encoder(name)
    if entry.audio is not None:
        audio = entry.audio.model_copy(update={"duration_s": 1.0})
        return entry.clip, audio, torch.randn(2, 1, *plan_spectrogram_shape(audio))
    assert entry.frame is not None
    frame = entry.frame.model_copy(update={"crop": 40})
    clip = entry.clip.model_copy(update={"n_frames": 8})
    return clip, frame, torch.randn(2, len(frame.mean), 8, 40, 40)


def test_encoders_and_weights_are_listed_without_torch() -> None:
    probe = (
        "import sys, echoshift.extract.weights.load; from echoshift.extract.encoders.registry import list_encoders; "
        "e = list_encoders()['slowfast_r101']; print(e.output_shapes(e.clip, e.spec)['pooled'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[0] == "(2304,) False"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder whose files count as files of extract/encoders/."""
    monkeypatch.setattr(encoders, "__path__", [*encoders.__path__, str(tmp_path)])
    list_builtin_encoders.cache_clear()
    yield tmp_path
    list_builtin_encoders.cache_clear()
    for name in ("added", "added_too"):
        sys.modules.pop(f"{encoders.__name__}.{name}", None)
        vars(encoders).pop(name, None)


_ADDED = """
from echoshift.extract.encoders.registry import EncoderEntry
from echoshift.pipeline.specs import ClipSpec, FrameSpec

def build():
    from torch import nn

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3, 4))

    return Mean()

ENTRY = EncoderEntry(
    name="added", modality="rgb", revision=1, clip=ClipSpec(n_frames=8, stride=2, rate_hz=15, n_clips=5),
    frame=FrameSpec(input="rgb", short_side=64, crop=64, mean=(0.0,) * 3, std=(1.0,) * 3),
    build=build, output_shapes=lambda clip, frame: {"pooled": (3,)},
)
"""


def test_a_file_in_the_folder_is_an_encoder(folder: Path) -> None:
    (folder / "added.py").write_text(_ADDED)
    entry = list_encoders()["added"]
    assert set(list_encoders()) == {"added", *ENCODERS}
    assert find_encoder("added") is entry
    x = torch.arange(6.0).reshape(2, 3, 1, 1, 1)
    network = entry.build()
    assert compute_outputs(network, x, ["pooled"])["pooled"].tolist() == x.flatten(1).tolist()
    with pytest.raises(SpecError, match="added has no trunk: it only extracts, Stage 1 can't train it"):
        require_trunk(network, "added")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "extract/encoders/added_too.py needs an EncoderEntry in ENTRY, or several in ENTRIES"),
        (_ADDED, "extract/encoders/added_too.py: the name 'added' is taken; take another"),
        (
            _ADDED.replace('modality="rgb"', 'modality="flow"'),
            "needs a `frame` for rgb or flow, or an `audio`",
        ),
        (_ADDED.replace('{"pooled": (3,)}', '{"tokens": (3,)}'), "plans no shape for its default outputs pooled"),
        (_ADDED.replace("lambda clip, frame", "lambda clip"), "can't plan its outputs: TypeError"),
    ],
)
def test_a_wrong_file_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "added.py").write_text(_ADDED)
    (folder / "added_too.py").write_text(text)
    with pytest.raises(PluginError) as caught:
        list_builtin_encoders()
    assert message in str(caught.value)


def test_outputs_without_a_trunk_are_what_forward_returns() -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return {"tokens": x, "pooled": x.mean(dim=1)} if x.ndim == 3 else [x]

    x = torch.randn(2, 4, 5)
    assert list(compute_outputs(Named(), x, ["pooled", "tokens"])) == ["pooled", "tokens"]
    with pytest.raises(SpecError, match="Named returns no 'logits', which its entry plans; it returns tokens, pooled"):
        compute_outputs(Named(), x, ["logits"])
    with pytest.raises(SpecError, match="Named returns a list; forward returns a tensor, or a dict of named tensors"):
        compute_outputs(Named(), x[0], ["pooled"])


@pytest.mark.parametrize("name", _SMALL)
def test_outputs_have_the_planned_shapes_and_trunk_plus_head_is_forward(name: str) -> None:
    torch.manual_seed(0)
    clip, spec, x = _small_input(name)
    network = find_encoder(name).build().eval()
    shapes = find_encoder(name).output_shapes(clip, spec)
    with torch.inference_mode():
        outputs = network(x, list(shapes))
        trunk = network.trunk(x)
        kept = {key: value.clone() for key, value in trunk.items()}
        head = network.head(trunk)
    assert {key: tuple(value.shape[1:]) for key, value in outputs.items()} == shapes
    assert list(outputs) == list(shapes) == [*network.trunk_names, *network.head_names]
    for key, value in {**trunk, **head}.items():
        assert torch.equal(value, outputs[key]), key
    assert all(torch.equal(trunk[key], kept[key]) for key in kept)


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
    if name in _PARAMETERS:
        assert sum(parameter.numel() for parameter in network.parameters()) == _PARAMETERS[name]


@pytest.mark.parametrize("name", ["slowfast_demo", "slowonly_r50_flow", "i3d_rgb", "resnet_demo", "bninception_audio"])
def test_the_split_stage_begins_the_head_and_the_classifier_sees_what_is_said(name: str) -> None:
    torch.manual_seed(0)
    network = find_encoder(name).build().eval().requires_grad_(False)
    x = _small_input(name)[2][:1]
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


def test_messages() -> None:
    for name, message in (
        ("slowfast_r_101", r"no encoder 'slowfast_r_101'; did you mean 'slowfast_r101'\?"),
        ("zzz", r"no encoder 'zzz'; there are .*slowfast_r50, "),
    ):
        with pytest.raises(SpecError, match=message):
            find_encoder(name)
    for name, shape, output, message in (
        (
            "slowfast_demo",
            (1, 3, 8, 32, 32),
            "feature",
            "SlowFast has no output 'feature'; it has trunk_slow, trunk_fast",
        ),
        ("slowfast_demo", (1, 3, 6, 32, 32), "pooled", "divisible by 4, not 6"),
        ("slowfast_demo", (1, 2, 8, 32, 32), "pooled", r"takes \[B, 3, T, H, W\], not \[1, 2, 8, 32, 32\]"),
        ("resnet_demo", (1, 2, 32, 32), "pooled", r"takes \[B, 1, F, N\], not \[1, 2, 32, 32\]"),
    ):
        with pytest.raises(SpecError, match=message):
            find_encoder(name).build()(torch.zeros(shape), [output])
