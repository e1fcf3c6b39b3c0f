"""Local paths and URLs of stores, and errors that name the place and the remedy."""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from echoshift.pipeline.errors import EchoshiftError, StoreError, StoreFullError, StoreReadOnlyError

# Another process's writes must be seen at once.
STORAGE_OPTIONS: dict[str, Any] = {"use_listings_cache": False}
DRIVERS = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "sftp": "paramiko",
}  # fmt: skip
WITH_EXTRA = {"s3fs": "pip install 'echoshift[s3]' (in the checkout: pip install -e '.[s3]')"}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Location:
    """A local path or a URL, as text; made by `locate`."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __fspath__(self) -> str:
        if self.is_remote:
            raise StoreError(f"{self.text} is a URL, and this needs a local file or folder")
        return self.text

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.text.rstrip('/')}/{name}" if self.text != "." else name)

    @property
    def is_remote(self) -> bool:
        """Whether fsspec, not the operating system, reads and writes here."""
        return "://" in self.text

    @property
    def name(self) -> str:
        """The last part."""
        return self.text.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending with its dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> Location:
        """The folder, or the prefix, that this lies in."""
        return Location(self.text.rpartition("/")[0]) if self.is_remote else Location(str(Path(self.text).parent))

    def absolute(self) -> Location:
        """Return the same place for a process with another working directory."""
        return self if self.is_remote else Location(str(Path(self.text).absolute()))

    def beside(self, ending: str) -> Location:
        """Return the file beside a store whose name is the store's and an ending."""
        return Location(f"{self.text}{ending}")

    def exists(self) -> bool:
        """Return whether anything is here; on an object store also where only longer keys begin so."""
        return self._remote(lambda fs, path: fs.exists(path)) if self.is_remote else Path(self.text).exists()

    def read_text(self) -> str | None:
        """Read a small UTF-8 file; None where there is none."""
        try:
            if self.is_remote:
                return self._remote(lambda fs, path: bytes(fs.cat_file(path)).decode())
            with telling_faults(self):
                return Path(self.text).read_text(encoding="utf-8")
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def write_text(self, text: str) -> None:
        """Replace a small UTF-8 file in one step."""
        if self.is_remote:
            self._write_bytes(text.encode())
            return
        fresh = Path(f"{self.text}.{os.getpid()}.partial")
        with telling_faults(self):
            try:
                fresh.write_text(text, encoding="utf-8")
                fresh.replace(self.text)
            except OSError:
                fresh.unlink(missing_ok=True)
                raise

    def append_text(self, text: str) -> None:
        """Append to a small UTF-8 file; on an object store by rewriting it, which only a store's holder may."""
        if self.is_remote:
            self.write_text((self.read_text() or "") + text)
            return
        with telling_faults(self), Path(self.text).open("a", encoding="utf-8") as file:
            file.write(text)

    def create_text(self, text: str) -> bool:
        """Write a small UTF-8 object where there is none, and say whether it did; URLs only."""
        try:
            self._remote(lambda fs, path: fs.pipe_file(path, text.encode(), mode="create"))
        except StoreError as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        return True

    def make_parent(self) -> None:
        """Make the folder this lies in; object stores have none."""
        if not self.is_remote:
            with telling_faults(self):
                Path(self.text).parent.mkdir(parents=True, exist_ok=True)

    def unlink(self) -> None:
        """Remove a file, if there is one."""
        if self.is_remote:
            if self.exists():
                self._remote(lambda fs, path: fs.rm_file(path))
            return
        with telling_faults(self):
            Path(self.text).unlink(missing_ok=True)

    def remove_tree(self) -> None:
        """Remove every object below a URL."""
        if self.exists():
            self._remote(lambda fs, path: fs.rm(path, recursive=True))

    def upload(self, folder: Path, last: str) -> None:
        """Copy a folder's files below this URL, the one named `last` after all others."""
        files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p == folder / last, p))
        for file in files:
            (self / file.relative_to(folder).as_posix())._write_bytes(file.read_bytes())

    def list_folders_and_files(self, pattern: str) -> list[Location]:
        """List what matches a pattern of parts with `*` below here, sorted; nothing where there is no such place."""
        if not self.is_remote:
            return [Location(str(path)) for path in sorted(Path(self.text).glob(pattern))]
        found = self._remote(lambda fs, path: [fs.unstrip_protocol(p) for p in fs.glob(f"{path}/{pattern}")])
        return [Location(str(url).rstrip("/")) for url in sorted(found)]

    def measure_bytes(self) -> int:
        """Add up the bytes of a file, or of all files below."""
        if self.is_remote:
            return int(self._remote(lambda fs, path: fs.du(path)))
        path = Path(self.text)
        if path.is_file():
            return path.stat().st_size
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    def _write_bytes(self, data: bytes) -> None:
        self._remote(lambda fs, path: fs.pipe_file(path, data))

    def _remote(self, act: Callable[[Any, str], T]) -> T:
        """Act on the URL's file system and the path in it; what its driver refuses becomes a StoreError."""
        import fsspec.core  # type: ignore[import-untyped]

        with telling_faults(self):
            try:
                fs, path = fsspec.core.url_to_fs(self.text, **STORAGE_OPTIONS)
            except ImportError as error:
                protocol = self.text.partition("://")[0]
                driver = DRIVERS.get(protocol, "its driver")
                how = WITH_EXTRA.get(driver, f"pip install {driver}")
                raise StoreError(f"{self.text}: {protocol}:// needs the package {driver}: {how}") from error
            except ValueError as error:
                raise StoreError(f"{self.text}: {error}; {ask_for_options(self.text)}") from error
            return act(fs, path)


Place = str | os.PathLike[str]


def locate(place: Place) -> Location:
    """Make a Location of a path or a URL; raises StoreError where a URL carries a password or lost a slash."""
    if isinstance(place, Location):
        return place
    text = os.fspath(place)
    if re.match(r"[a-z][a-z0-9+]+:/[^/]", text):
        raise StoreError(f"{text} is neither a path nor a URL; a URL has two slashes after the colon")
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        return Location(str(Path(text)))
    parts = urlsplit(text)
    if parts.password or parts.query:
        hidden = f"{parts.scheme}://…@{parts.hostname}{parts.path}"
        raise StoreError(f"{hidden}: a cache's URL may hold no password and no query; {ask_for_options(hidden)}")
    return Location(text.rstrip("/"))


FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
# Object stores' drivers have errors of their own beside OSError: no answer, no credentials, no right.
DRIVER_PACKAGES = frozenset(
    {"adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "ossfs", "paramiko"}
)
GUARDED_METHODS = (
    "read_array",
    "read",
    "read_clips",
    "read_all",
    "read_outputs",
    "extend",
    "begin_shard",
    "write_outputs",
    "commit_shard",
)

Store = TypeVar("Store")


def explain_fault(error: Exception, place: str) -> Exception:
    """Return the StoreError for a disk's or driver's error at a place; any other error comes back as it is."""
    if isinstance(error, EchoshiftError):
        return error
    remote = "://" in place
    if type(error).__module__.partition(".")[0] in DRIVER_PACKAGES:
        return StoreError(f"{place}: {_first_line(error)}; {ask_for_options(place)}")
    number = find_errno(error)
    if number in FULL:
        return StoreFullError(
            f"no space left for {place}: {count_free_bytes(place):,} bytes are free there; "
            f"free some, or give another --cache; what is committed stays, and the same command goes on from there"
        )
    if number in READ_ONLY and isinstance(error, OSError):
        remedy = ask_for_options(place) if remote else "change the rights, or give another --cache"
        return StoreReadOnlyError(f"no right to write {place}: {error.strerror or _first_line(error)}; {remedy}")
    if number is not None or isinstance(error, OSError):
        remedy = ask_for_options(place) if remote else "look after the disk, then run the same command again"
        return StoreError(f"{place}: {_first_line(error)}; {remedy}")
    return error


def ask_for_options(place: str) -> str:
    """Describe where the options of a URL's driver come from."""
    protocol = place.partition("://")[0]
    aws = "AWS_* variables (AWS_ENDPOINT_URL, AWS_PROFILE, …), " if protocol.startswith("s3") else ""
    return f"the driver of {protocol}:// takes options from {aws}FSSPEC_{protocol.upper()}_* or fsspec's config files"


def find_errno(error: Exception) -> int | None:
    """Find an error's number, also where HDF5 only writes it into the text; None where there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"errno = (\d+)", str(error)) if isinstance(error, OSError | RuntimeError) else None
    return int(found[1]) if found else None


def count_free_bytes(place: str) -> int:
    """Count the bytes free for us on the local disk that a place is on, existing or not."""
    return shutil.disk_usage(find_existing(place)).free


def find_existing(place: Place) -> Path:
    """Find the nearest folder above a local place, or the place itself, that exists."""
    folder = Path(place).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


@contextmanager
def telling_faults(place: object) -> Iterator[None]:
    """Raise StoreError in place of a disk's or driver's error, which stays as its cause."""
    try:
        yield
    except Exception as error:
        explained = explain_fault(error, str(place))
        if explained is error:
            raise
        raise explained from error


def tell_store_faults(store_class: type[Store]) -> type[Store]:
    """Make the methods of a FeatureStore that touch its place tell faults as StoreError."""
    for name in GUARDED_METHODS:
        setattr(store_class, name, _guard(getattr(store_class, name)))
    return store_class


def _guard(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **options: Any) -> Any:
        with telling_faults(self.path):
            return method(self, *args, **options)

    return guarded


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
