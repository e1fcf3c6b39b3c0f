"""Tests what a config may call weights, random ones first, and the checksum that names them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from echoshift.extract.encoders.registry import find_encoder, list_builtin_encoders
from echoshift.extract.weights.load import default_weights, load_encoder, resolve_weights
from echoshift.pipeline.errors import SpecError, WeightsError
from echoshift.pipeline.tensor_files import tensor_sha256


def test_checksum_by_hand_and_whatever_the_order_or_layout() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor(7)
    digest = hashlib.sha256()
    digest.update(b"a\0torch.float32\0[2, 3]\0" + np.arange(6, dtype="<f4").tobytes())
    digest.update(b"b\0torch.int64\0[]\0" + np.array(7, dtype="<i8").tobytes())
    assert tensor_sha256({"b": b, "a": a}) == digest.hexdigest()
    assert tensor_sha256({"a": a.t().contiguous().t(), "b": b}) == digest.hexdigest()
    assert tensor_sha256({"a": a.reshape(3, 2), "b": b}) != digest.hexdigest()
    assert tensor_sha256({"a": a.double(), "b": b}) != digest.hexdigest()


def test_random_weights_are_the_same_in_every_process() -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    encoders = ("slowfast_demo", "resnet_demo")
    records = [resolve_weights("random:7", encoder) for encoder in encoders]
    for encoder, record in zip(encoders, records, strict=True):
        network = load_encoder(encoder, record)
        assert tensor_sha256(network.state_dict()) == record.sha256
        assert record.path is None and record.source == "default initialisation, seed 7"
        assert resolve_weights("random:8", encoder).sha256 != record.sha256
    assert torch.equal(torch.random.get_rng_state(), before)
    code = (
        "import torch; torch.set_num_threads(1); torch.rand(3);"
        "from echoshift.extract.weights.load import resolve_weights;"
        f"print(*[resolve_weights('random:7', encoder).sha256 for encoder in {encoders}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == [record.sha256 for record in records]


def test_defaults() -> None:
    assert {encoder: default_weights(encoder) for encoder in list_builtin_encoders()} == {
        "slowfast_r50": "slowfast-r50-pytorchvideo",
        "slowfast_r101": "slowfast-r101-pytorchvideo",
        "slowfast_r50_mmaction": "slowfast-r50-mmaction2",
        "slowfast_r101_mmaction": "slowfast-r101-mmaction2",
        "slowfast_demo": "random:0",
        "slowonly_r50_flow": "slowonly-r50-flow-mmaction2",
        "i3d_rgb": "i3d-rgb-kinetics400",
        "i3d_flow": "i3d-flow-piergiaj",
        "resnet18_audio": "resnet18-vggsound",
        "bninception_audio": "bninception-imagenet",
        "resnet_demo": "random:0",
    }
    with pytest.raises(SpecError, match="did you mean 'i3d_rgb'"):
        default_weights("i3d_rbg")


def test_file_without_a_header_is_taken_by_its_tensors(tmp_path: Path) -> None:
    network = find_encoder("resnet_demo").build()
    path = tmp_path / "mine.safetensors"
    save_file(network.state_dict(), path)
    record = resolve_weights(str(path), "resnet_demo")
    assert record.sha256 == tensor_sha256(network.state_dict())
    loaded = load_encoder("resnet_demo", record)
    assert torch.equal(loaded.state_dict()["net.fc.weight"], network.state_dict()["net.fc.weight"])
    with pytest.raises(WeightsError, match=r"mine\.safetensors \(for slowfast_demo\) doesn't fit: it lacks blocks\.0"):
        load_encoder("slowfast_demo", resolve_weights(str(path), "slowfast_demo"))
    state = dict(network.state_dict())
    state["net.fc.bias"] = torch.zeros(7)
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"has net\.fc\.bias as torch\.float32 \[7\], not torch\.float32 \[6\]"):
        load_encoder("resnet_demo", resolve_weights(str(path), "resnet_demo"))


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"kinetics400 isn't installed in .*; run `echoshift weights get i3d-"):
        resolve_weights("i3d-rgb-kinetics400", "i3d_rgb", tmp_path)
    with pytest.raises(WeightsError, match="no weights 'i3d-rgb-kinetics4000'; did you mean"):
        resolve_weights("i3d-rgb-kinetics4000", "i3d_rgb", tmp_path)
    with pytest.raises(WeightsError, match=r"no weights '\.\./x'"):
        resolve_weights("../x", "i3d_rgb", tmp_path)
    for ref in ("random:", "random:-1", "random:x", "random:9223372036854775808"):
        with pytest.raises(WeightsError, match="isn't random:SEED with a whole number"):
            resolve_weights(ref, "resnet_demo")
    with pytest.raises(WeightsError, match=r"there is no weights file .*absent\.safetensors"):
        resolve_weights(str(tmp_path / "absent.safetensors"), "resnet_demo")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    with pytest.raises(WeightsError, match=r"broken\.safetensors isn't a safetensors file"):
        resolve_weights(str(broken), "resnet_demo")
