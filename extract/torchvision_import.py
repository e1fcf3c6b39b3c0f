"""Makes `import torchvision` and `import torchaudio` work beside a build of torch that their binaries don't match.

The packages on the public index are CUDA builds; beside a CPU-only torch, torchvision's operators are not registered
and torchaudio's library can't be loaded (DECISIONS.md, 2026-11-24). Every module that needs timm, pytorchvideo or
torchaudio calls `ensure_torchvision` or `ensure_torchaudio` first.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from typing import Any

from echoshift.pipeline.errors import SpecError

_kept_libraries: list[Any] = []
# Readers and networks import in threads of their own; a half-imported package looks imported to the other thread.
_importing = threading.RLock()


def _drop_modules(root: str) -> None:
    for name in [n for n in list(sys.modules) if n == root or n.startswith(root + ".")]:
        del sys.modules[name]


def ensure_torchvision() -> None:
    """Import torchvision; defines its two missing operators when exactly those are missing."""
    with _importing:
        if "torchvision" not in sys.modules:
            _import_torchvision()


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        _drop_modules("torchvision")
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_libraries.append(library)
        importlib.import_module("torchvision")


def ensure_torchaudio() -> None:
    """Import torchaudio; put a stub in place of its extension loader when the library can't be loaded."""
    with _importing:
        if "torchaudio" not in sys.modules:
            _import_torchaudio()


def _import_torchaudio() -> None:
    try:
        importlib.import_module("torchaudio")
    except ModuleNotFoundError as error:
        if error.name != "torchaudio":
            raise
        raise SpecError("mel spectrograms need torchaudio; pip install 'torchaudio>=2.11,<2.12'") from error
    except OSError:
        _drop_modules("torchaudio")
        stub = types.ModuleType("torchaudio._extension")
        stub.__dict__.update(
            lazy_import_sox_ext=None,
            _IS_TORCHAUDIO_EXT_AVAILABLE=False,
            _IS_RIR_AVAILABLE=False,
            _IS_ALIGN_AVAILABLE=False,
            _check_cuda_version=lambda: None,
            fail_if_no_align=_fail_if_no_align,
        )
        sys.modules["torchaudio._extension"] = stub
        importlib.import_module("torchaudio")


def _fail_if_no_align(function: Any) -> Any:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError(f"torchaudio's {function.__name__} needs a torchaudio built for this torch")

    return refuse
