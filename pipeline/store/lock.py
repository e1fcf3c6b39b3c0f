"""The one writer that a store has: a file lock on a disk, an object put only where there is none on a URL."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from echoshift.pipeline.errors import StoreBusyError, StoreError, StoreFullError
from echoshift.pipeline.store.failures import FailureLedger
from echoshift.pipeline.store.layout import describe_writer
from echoshift.pipeline.store.location import Location, Place, locate, telling_faults

LOCK_POLL_S = 0.2

NotifyWaiting = Callable[[str], None]
"""Callback that is told, once, whom a run waits for."""


class StoreLock:
    """The right to write one store, and with it the store's failure ledger; `hold_store` makes it."""

    def __init__(self, path: Location, token: str = "") -> None:
        self.path = path
        self.ledger = FailureLedger(path)
        self._token = token

    def check(self) -> None:
        """Raise StoreError when somebody removed this lock; on a disk the kernel keeps it."""
        if self._token and not _has_token(_holder_file(self.path).read_text(), self._token):
            raise StoreError(
                f"{self.path}: its lock was removed while this process had it; nothing more is written, what is "
                f"committed is kept, the same command goes on from there"
            )


@contextmanager
def hold_store(
    place: Place, *, wait_s: float | None = None, notify: NotifyWaiting = lambda message: None
) -> Iterator[StoreLock]:
    """Hold the right to write a store until the block ends.

    On a disk it is a file lock, which the kernel frees when its process dies, however it dies. On a URL it is an object
    that is put only where there is none: one left by a process that died is removed by `echoshift store unlock`.

    Args:
        place: the store, existing or not.
        wait_s: seconds to wait for another holder to end, math.inf for ever; None refuses at once.
        notify: is told whom it waits for.

    Raises StoreBusyError naming the holder, StoreReadOnlyError where nothing can be written.
    """
    path = locate(place)
    with _hold_remote(path, wait_s, notify) if path.is_remote else _hold_local(path, wait_s, notify) as lock:
        yield lock


def remove_lock(place: Place) -> str:
    """Remove the lock of a store on a URL, whoever has it, and return whose it was; "" where there is none.

    Raises StoreError on a disk, where the kernel frees a dead process's lock by itself.
    """
    path = locate(place)
    if not path.is_remote:
        raise StoreError(f"{path} is on a disk: a lock there ends with its process, there is nothing to remove")
    text = _holder_file(path).read_text()
    if text is None:
        return ""
    _holder_file(path).unlink()
    return describe_holder(text)


def describe_holder(text: str | None) -> str:
    """Describe in words who holds a store, from the text of its `.holder.json`."""
    try:
        holder = json.loads(text or "")
        who = f"process {holder['pid']} of {holder['user']} on {holder['host']}"
        return f"{who} since {holder['when']} (dataset {holder.get('dataset', '?')})"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "an unknown process"


def _holder_file(path: Location) -> Location:
    return path.beside(".holder.json")


def _describe_self(path: Location, **more: str) -> str:
    return json.dumps({"pid": os.getpid(), **describe_writer(), "dataset": path.parent.name, **more}) + "\n"


def _has_token(text: str | None, token: str) -> bool:
    try:
        return text is not None and json.loads(text).get("token") == token
    except json.JSONDecodeError:
        return False


def _busy(path: Location) -> StoreBusyError:
    holder = describe_holder(_holder_file(path).read_text())
    remedy = f"; if that process is dead, `echoshift store unlock {path}` removes its lock" if path.is_remote else ""
    return StoreBusyError(f"{path} is being written by {holder}; wait for it with --wait, or stop it{remedy}")


@contextmanager
def _hold_local(path: Location, wait_s: float | None, notify: NotifyWaiting) -> Iterator[StoreLock]:
    holder_file = _holder_file(path)
    # Without the fallback: a lock that is only a file's existence would outlive a killed process.
    lock = FileLock(str(path.beside(".lock")), fallback_to_soft=False)
    path.make_parent()
    with telling_faults(path):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            if wait_s is None:
                raise _busy(path) from error
            notify(f"waiting for {describe_holder(holder_file.read_text())}, who writes {path}")
            try:
                lock.acquire(timeout=-1 if wait_s == float("inf") else wait_s, poll_interval=LOCK_POLL_S)
            except Timeout as still:
                raise _busy(path) from still
    try:
        # Who holds it is only told: on a full disk a run with nothing to do still ends well.
        with suppress(StoreFullError):
            holder_file.write_text(_describe_self(path))
        yield StoreLock(path)
    finally:
        holder_file.unlink()
        lock.release()


@contextmanager
def _hold_remote(path: Location, wait_s: float | None, notify: NotifyWaiting) -> Iterator[StoreLock]:
    holder_file, token = _holder_file(path), uuid.uuid4().hex
    started, notified = time.monotonic(), False
    while not holder_file.create_text(_describe_self(path, token=token)):
        if wait_s is None:
            raise _busy(path)
        if not notified:
            notify(f"waiting for {describe_holder(holder_file.read_text())}, who writes {path}")
            notified = True
        if time.monotonic() - started > wait_s:
            raise _busy(path)
        time.sleep(LOCK_POLL_S)
    try:
        yield StoreLock(path, token)
    finally:
        if _has_token(holder_file.read_text(), token):
            holder_file.unlink()
