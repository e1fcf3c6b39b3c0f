"""Tests I3D with its real Kinetics-400 weights: tensor by tensor against DeepMind's list, and on a real video."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from echoshift.extract.encoders.network import EncoderNetwork
from echoshift.extract.encoders.registry import find_encoder
from echoshift.extract.weights.load import find_weights_dir, load_encoder, resolve_weights

_NAME = "i3d-rgb-kinetics400"
# DeepMind's TensorFlow names; one layer of Mixed_5b is called Conv3d_0a_3x3 there by mistake.
_BRANCHES = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_2/Conv3d_0a_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
    "Logits/Conv3d_0c_1x1": "logits",
}
_LEAVES = {
    "conv_3d/w": "conv3d.weight",
    "conv_3d/b": "conv3d.bias",
    "batch_norm/beta": "bn.bias",
    "batch_norm/moving_mean": "bn.running_mean",
    "batch_norm/moving_variance": "bn.running_var",
}


@pytest.fixture(scope="module")
def network() -> EncoderNetwork:
    if not (find_weights_dir() / f"{_NAME}.json").is_file():
        pytest.skip(f"{_NAME} isn't installed in {find_weights_dir()}; run `echoshift weights get {_NAME}`")
    return load_encoder("i3d_rgb", resolve_weights(_NAME, "i3d_rgb"))


def _rename(tensorflow_name: str) -> str:
    _, _, name = tensorflow_name.partition("/inception_i3d/")
    for theirs, ours in (*_BRANCHES.items(), *_LEAVES.items()):
        name = name.replace(theirs, ours)
    return name.replace("/", ".")


@pytest.mark.shared
@pytest.mark.parametrize("modality", ["rgb", "flow"])
def test_architecture_is_deepminds_tensor_by_tensor(shared_data: Path, modality: str) -> None:
    path = shared_data / "reference_i3d" / f"{modality}_imagenet.vars.json"
    theirs = {name: entry["shape"] for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    with torch.device("meta"):
        state = find_encoder(f"i3d_{modality}").build().state_dict()
    ours = {
        name: list(tensor.permute(2, 3, 4, 1, 0).shape if tensor.ndim == 5 else tensor.shape)
        for name, tensor in state.items()
        if not name.endswith(("num_batches_tracked", "bn.weight"))
    }
    assert ours == {_rename(name): shape for name, shape in theirs.items()}
    n_values = sum(int(np.prod(shape)) for shape in ours.values())
    assert n_values == (12_704_544 if modality == "rgb" else n_values)


@pytest.mark.shared
@pytest.mark.weights
def test_real_weights_recognise_the_video(shared_data: Path, network: EncoderNetwork) -> None:
    import av

    labels = (shared_data / "annotations" / "kinetics" / "K400_label_map.txt").read_text(encoding="utf-8").split("\n")
    frames: list[np.ndarray] = []
    with av.open(str(shared_data / "activitynet" / "v_GGSY1Qvo990.mp4")) as container:
        for frame in container.decode(video=0):
            frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == 64:
                break
    x = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    height, width = x.shape[2:]
    scale = 256 / min(height, width)
    x = F.interpolate(x, (round(height * scale), round(width * scale)), mode="bilinear", antialias=True)
    top, left = (x.shape[2] - 224) // 2, (x.shape[3] - 224) // 2
    x = (x[:, :, top : top + 224, left : left + 224] / 127.5 - 1).transpose(0, 1)[None]
    with torch.inference_mode():
        outputs = network(x, ["pooled", "logits"])
    probability = outputs["logits"].softmax(dim=1)[0]
    assert labels[int(probability.argmax())] == "clean and jerk"
    assert float(probability.max()) == pytest.approx(0.964, abs=0.01)  # another port of these weights says 0.96
    assert outputs["pooled"].shape == (1, 1024)
