"""Takes Stage 1 from videos to table with the published networks, on random weights and small pictures."""

from __future__ import annotations

import pytest
import tiny_shift
from safetensors import safe_open

from echoshift.pipeline.store.layout import DONE
from echoshift.pipeline.store.open import open_store


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("encoder", "gates", "n_pooled"),
    [
        ("slowfast_r50", {"trunk_slow": 1280, "trunk_fast": 128}, 2304),
        ("slowfast_r101", {"trunk_slow": 1280, "trunk_fast": 128}, 2304),
        ("i3d_rgb", {"trunk": 832}, 1024),
    ],
)
def test_a_run_gates_each_path_of_a_published_network(tmp_path, encoder, gates, n_pooled):
    tiny = tiny_shift.TinyShift(tmp_path, tmp_path / "runs")
    tiny.make()
    tiny.write_card(encoders=(encoder, "resnet18_audio"))
    code, out, err = tiny.stage1(
        settings=(
            'visual.overrides=["frame.short_side=72", "frame.crop=64"]',
            "visual.weights=random:0",
            "sound.weights=random:0",
            "training.trainable_from=split",
            "training.n_epochs=1",
        )
    )
    assert code == 0, err
    assert "synthetic" in out
    with safe_open(tiny.find_step("encoder") / "encoder.safetensors", "pt") as tensors:
        found = {
            name.split(".")[-2]: tensors.get_slice(name).get_shape()[0]
            for name in tensors.keys()  # noqa: SIM118 -- a safe_open is no mapping
            if ".heads." in name and name.endswith(".bias")
        }
    assert found == gates
    [path] = tiny.find_step("features").glob("*.zarr")
    store = open_store(path)
    assert {output.name: output.shape for output in store.spec.outputs}["pooled"] == (n_pooled,)
    assert (store.read_array("state") == DONE).all()
