"""Turns what a disk or an object store refuses into errors that name the place and the remedy."""

from __future__ import annotations

import errno
import functools
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from echoshift.pipeline.errors import EchoshiftError, StoreError, StoreFullError, StoreReadOnlyError

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
    folder = Path(place).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


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
