"""Tests the inference form of the encoders against the trainable networks it is made from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from echoshift.extract.encoders.inference_form import (
    FusedConv,
    choose_precision_hint,
    fold_norm,
    prepare_for_inference,
)
from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.extract.encoders.registry import find_encoder
from echoshift.pipeline.errors import SpecError

_CPU = torch.device("cpu")
_SHAPES = {
    "slowfast_r50_mmaction": (1, 3, 8, 40, 40),
    "slowfast_demo": (2, 3, 8, 64, 64),
    "slowonly_r50_flow": (2, 2, 4, 40, 40),
    "i3d_rgb": (1, 3, 17, 65, 65),
    "i3d_flow": (2, 2, 1, 32, 32),
    "resnet18_audio": (1, 1, 65, 100),
    "resnet_demo": (2, 1, 257, 100),
    "bninception_audio": (1, 1, 65, 100),
}


def _build(name: str) -> EncoderNetwork:
    torch.manual_seed(0)
    network = find_encoder(name).build().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


@pytest.mark.parametrize("name", _SHAPES)
def test_every_output_differs_by_rounding_alone(name: str) -> None:
    network = _build(name)
    names = [*network.trunk_names, *network.head_names]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    form = prepare_for_inference(network, _CPU)
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d) for m in form.modules())
    x = torch.randn(_SHAPES[name])
    kept = x.clone()
    with torch.inference_mode():
        wanted, found = network(x, names), form(x, names)
        trunk = form.trunk(x)
        copied = {key: value.clone() for key, value in trunk.items()}
        form.head(trunk)
    assert list(found) == names
    for key in names:
        assert found[key].shape == wanted[key].shape and found[key].dtype == torch.float32
        difference = (found[key] - wanted[key]).abs().max() / wanted[key].abs().max()
        assert difference < 1e-5, (key, difference)
    assert torch.equal(x, kept)
    assert all(torch.equal(trunk[key], copied[key]) for key in trunk)  # the head leaves the trunk's outputs alone
    after = network.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_the_same_clip_gives_the_same_bytes_whatever_ran_before() -> None:
    form = prepare_for_inference(_build("slowfast_demo"), _CPU)
    x = torch.randn(2, 3, 8, 64, 64)
    with torch.inference_mode():
        first = form(x, ["pooled", "trunk_fast"])
        for shape in ((1, 3, 8, 64, 64), (3, 3, 8, 64, 64), (2, 3, 16, 32, 32)):
            form(torch.randn(shape), ["pooled"])
        again = form(x, ["pooled", "trunk_fast"])
        fresh = prepare_for_inference(_build("slowfast_demo"), _CPU)(x, ["pooled", "trunk_fast"])
    for key in first:
        assert torch.equal(first[key], again[key]) and torch.equal(first[key], fresh[key])


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_without_onednn_torchs_own_convolutions_serve_every_precision(precision, dtype, monkeypatch):
    monkeypatch.setattr("echoshift.extract.encoders.inference_form.has_onednn", lambda _device, _dtype: False)
    network = _build("resnet_demo")
    form = prepare_for_inference(network, _CPU, precision)
    x = torch.randn(1, 1, 65, 80)
    with torch.inference_mode():
        wanted, found = network(x, ["map", "pooled"]), form(x, ["map", "pooled"])
    assert found["map"].dtype == dtype and found["pooled"].dtype == torch.float32
    if precision == "fp32":
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5)
    else:
        assert torch.cosine_similarity(found["pooled"], wanted["pooled"]).min() > 0.999
        assert not torch.allclose(found["pooled"], wanted["pooled"], rtol=1e-6)


def test_norm_is_folded_by_hand() -> None:
    conv, norm = nn.Conv2d(1, 1, 1, bias=True), nn.BatchNorm2d(1, eps=0.0)
    values = {"weight": 3.0, "bias": 5.0, "running_mean": 2.0, "running_var": 4.0}
    norm.load_state_dict(
        {**{key: torch.tensor([v]) for key, v in values.items()}, "num_batches_tracked": torch.tensor(1)}
    )
    with torch.no_grad():
        conv.weight.fill_(7.0)
        assert conv.bias is not None
        conv.bias.fill_(1.0)
        weight, bias = fold_norm(conv, norm)
    # (7 x + 1 - 2) / 2 * 3 + 5 = 10.5 x + 3.5
    assert weight.flatten().tolist() == [10.5] and bias is not None and bias.tolist() == [3.5]
    fused = FusedConv(conv, norm, has_relu=True)
    with torch.inference_mode():
        assert fused(torch.tensor([[[[2.0, -1.0]]]])).flatten().tolist() == [24.5, 0.0]


def test_what_has_no_form_is_named_and_the_hint_fits_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = nn.Linear(2, 3)
    with pytest.raises(SpecError, match="Linear has no inference form in bf16; use fp32"):
        prepare_for_inference(odd, _CPU, "bf16")
    form = prepare_for_inference(odd, _CPU)
    assert type(form) is nn.Linear and form is not odd and not form.training
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    for has_amx, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        assert choose_precision_hint(_CPU) == wanted
