"""Tests the list of encoders: specifications, shapes of outputs, builders and messages."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from echoshift.extract.encoders.registry import ENCODERS, find_encoder
from echoshift.extract.recipes import plan_spectrogram_shape
from echoshift.pipeline.errors import SpecError
from echoshift.pipeline.specs import AudioSpec, ClipSpec, FeatureSpec, FrameSpec, OutputSpec

_BIG = [name for name in ENCODERS if not name.endswith("_demo")]
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


def _small_input(name: str) -> tuple[ClipSpec, FrameSpec | AudioSpec, torch.Tensor]:
    entry = find_encoder(name)
    if entry.audio is not None:
        audio = entry.audio.model_copy(update={"duration_s": 1.0})
        return entry.clip, audio, torch.randn(2, 1, *plan_spectrogram_shape(audio))
    assert entry.frame is not None
    frame = entry.frame.model_copy(update={"crop": 40})
    clip = entry.clip.model_copy(update={"n_frames": 8})
    return clip, frame, torch.randn(2, len(frame.mean), 8, 40, 40)


def test_registry_and_weights_are_listed_without_torch() -> None:
    probe = (
        "import sys, echoshift.extract.weights.resolve; from echoshift.extract.encoders.registry import ENCODERS; "
        "e = ENCODERS['slowfast_r101']; print(e.output_shapes(e.clip, e.frame)['pooled'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[0] == "(2304,) False"


@pytest.mark.parametrize("name", ENCODERS)
def test_entry_makes_a_valid_feature_spec(name: str) -> None:
    entry = ENCODERS[name]
    spec = entry.frame or entry.audio
    assert spec is not None
    shapes = entry.output_shapes(entry.clip, spec)
    outputs = tuple(OutputSpec(name=output, shape=shapes[output]) for output in entry.default_outputs)
    FeatureSpec(
        encoder=name, weights="0" * 64, clip=entry.clip, frame=entry.frame, audio=entry.audio, outputs=outputs,
        revision=entry.revision,
    )  # fmt: skip
    assert entry.name == name
    assert entry.modality == ("audio" if entry.frame is None else entry.frame.input)


@pytest.mark.parametrize("name", [name for name in ENCODERS if "r101" not in name and name != "slowfast_r50"])
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


@pytest.mark.parametrize("name", _PARAMETERS)
def test_number_of_parameters_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        network = find_encoder(name).build()
    assert sum(parameter.numel() for parameter in network.parameters()) == _PARAMETERS[name]


def test_default_shapes_are_those_of_the_paper() -> None:
    for name in ("slowfast_r50", "slowfast_r101_mmaction"):
        entry = ENCODERS[name]
        assert entry.frame is not None
        at_224 = entry.frame.model_copy(update={"crop": 224})
        assert entry.output_shapes(entry.clip, at_224) == {
            "trunk_slow": (1280, 8, 14, 14),
            "trunk_fast": (128, 32, 14, 14),
            "pooled": (2304,),
            "pooled_avg": (2304,),
            "tokens_slow": (8, 2048),
            "tokens_fast": (32, 256),
            "logits": (400,),
        }
        charades = ClipSpec(n_frames=64, stride=8, n_clips=10)
        assert entry.output_shapes(charades, at_224)["tokens_slow"] == (16, 2048)
        assert entry.output_shapes(charades, at_224)["tokens_fast"] == (64, 256)
    audio = ENCODERS["resnet18_audio"]
    assert audio.audio is not None
    assert audio.output_shapes(audio.clip, audio.audio)["map"] == (256, 17, 63)


def test_head_isnt_run_when_only_the_trunk_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    network = find_encoder("slowfast_demo").build().eval()

    def refuse(_outputs: object) -> None:
        raise AssertionError("the head ran")

    monkeypatch.setattr(network, "head", refuse)
    assert list(network(torch.zeros(1, 3, 8, 32, 32), ["trunk_fast"])) == ["trunk_fast"]


def test_messages() -> None:
    with pytest.raises(SpecError, match=r"no encoder 'slowfast_r_101'; did you mean 'slowfast_r101'\?"):
        find_encoder("slowfast_r_101")
    with pytest.raises(SpecError, match="no encoder 'zzz'; there are slowfast_r50, "):
        find_encoder("zzz")
    network = find_encoder("slowfast_demo").build()
    with pytest.raises(SpecError, match="SlowFast has no output 'feature'; it has trunk_slow, trunk_fast, pooled"):
        network(torch.zeros(1, 3, 8, 32, 32), ["feature"])
    with pytest.raises(SpecError, match="divisible by 4, not 6"):
        network(torch.zeros(1, 3, 6, 32, 32), ["pooled"])
    with pytest.raises(SpecError, match=r"takes \[B, 3, T, H, W\], not \[1, 2, 8, 32, 32\]"):
        network(torch.zeros(1, 2, 8, 32, 32), ["pooled"])
    entry = ENCODERS["resnet_demo"]
    assert ENCODERS["slowfast_demo"].frame is not None
    with pytest.raises(SpecError, match="an audio encoder needs an AudioSpec"):
        entry.output_shapes(entry.clip, ENCODERS["slowfast_demo"].frame)
