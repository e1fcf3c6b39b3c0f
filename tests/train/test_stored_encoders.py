"""Checkpoints written by 0.1.0 before the rebuild are read, and predict what they did then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_encoder

from echoshift.train.stage1.config import Stage1Config
from echoshift.train.stage1.encoder import read_checkpoint, read_facts, write_checkpoint
from echoshift.train.stage1.export import predict_segments

STORED = Path(__file__).with_name("data") / "stage1"
PREDICTED = {  # of segments v0, v1 and s3, the last of which is silent
    "encoder": [[0.288547, 0.358957, 0.352496], [0.288955, 0.358185, 0.352860], [0.288717, 0.359102, 0.352181]],
    "objective": [[0.271146, 0.341371, 0.387483], [0.272249, 0.340737, 0.387014], [0.322545, 0.343324, 0.334131]],
}


@pytest.mark.parametrize("name", PREDICTED)
def test_a_stored_checkpoint_predicts_what_it_did_and_is_written_alike(tmp_path, name):
    path = STORED / f"{name}.safetensors"
    facts = read_facts(path)
    model = tiny_encoder.build(Stage1Config.model_validate_json(facts.config), "normed")
    identity = read_checkpoint(path, model)
    audio = tiny_encoder.write_sound(tmp_path, tiny_encoder.list_ids())
    clips = tiny_encoder.MemoryInputs().iterate_clips(["v0", "v1", "s3"], tiny_encoder.make_task().validation_spec)
    found = predict_segments(model, clips, audio, multi_label=False, device=tiny_encoder.CPU)
    np.testing.assert_allclose([p.probabilities for p in found], PREDICTED[name], atol=2e-5)
    assert write_checkpoint(tmp_path / "again.safetensors", model, facts) == identity
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
