"""Tests that torchvision, timm, pytorchvideo and torchaudio can be imported beside this torch."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from echoshift.extract import torchvision_import
from echoshift.pipeline.errors import SpecError

_PROBE = """
from concurrent.futures import ThreadPoolExecutor
from echoshift.extract.torchvision_import import ensure_torchaudio, ensure_torchvision
def see():
    ensure_torchvision()
    import torchvision.models
def hear():
    ensure_torchaudio()
    import torchaudio.functional
with ThreadPoolExecutor(4) as threads:
    for done in [threads.submit(f) for f in (see, see, hear, hear)]:
        done.result()
ensure_torchvision()
ensure_torchaudio()
import torch, torchvision, torchaudio, timm, pytorchvideo.models.slowfast
from torchvision.transforms.v2.functional import resize
print(tuple(resize(torch.zeros(3, 40, 60, dtype=torch.uint8), [20, 30]).shape))
print(tuple(torchaudio.functional.resample(torch.zeros(1, 800), 8000, 16000).shape))
print(float(torchvision.ops.box_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]]))))
"""


def test_everything_imports_in_a_fresh_process_from_several_threads() -> None:
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[:2] == ["(3, 20, 30)", "(1, 1600)"]
    assert float(done.stdout.splitlines()[2]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("ensure", "module", "error"),
    [
        ("ensure_torchvision", "torchvision", RuntimeError("another fault")),
        ("ensure_torchaudio", "torchaudio", ImportError("no")),
    ],
)
def test_any_other_fault_is_passed_on(monkeypatch, ensure, module, error):
    def fail(_name: str) -> None:
        raise error

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(type(error), match=str(error)):
        getattr(torchvision_import, ensure)()


def test_where_torchaudio_is_missing_the_error_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(SpecError, match="mel spectrograms need torchaudio; pip install"):
        torchvision_import.ensure_torchaudio()
