"""Gives every test the shared media and annotations, and an S3-compatible server, or skips it with the reason."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Find the folder with real media and annotations: ECHOSHIFT_SHARED, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("ECHOSHIFT_SHARED", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (root / "grid_av").is_dir():
        pytest.skip(f"no shared data at {root}; set ECHOSHIFT_SHARED")
    return root


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Run moto's S3 server in a thread, on a free port of this machine; return its URL."""
    moto_server = pytest.importorskip("moto.server", reason="no moto, the S3-compatible server of the tests")
    pytest.importorskip("s3fs", reason="no s3fs, the driver of s3://")
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Make a bucket of this test's own, and the environment in which any process finds its server; return its URL."""
    import fsspec

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "an-access-key",
        "AWS_SECRET_ACCESS_KEY": "a-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"b{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}"
