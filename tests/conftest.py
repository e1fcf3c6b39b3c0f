"""Gives every test the shared media and annotations, or skips it with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Finds the folder with real media and annotations: ECHOSHIFT_SHARED, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("ECHOSHIFT_SHARED", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (root / "grid_av").is_dir():
        pytest.skip(f"no shared data at {root}; set ECHOSHIFT_SHARED")
    return root
