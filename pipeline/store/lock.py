"""The lock of a store's one writer."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from echoshift.pipeline.errors import LeaseLostError, StoreBusyError, StoreError, StoreFullError
from echoshift.pipeline.store.failures import FailureLedger
from echoshift.pipeline.store.layout import describe_writer
from echoshift.pipeline.store.location import Location, Place, locate, telling_faults


@dataclass(frozen=True, slots=True)
class LeaseTiming:
    """How often a holder counts up, and how long a counter must stand still before another may take over."""

    beat_s: float = 5.0
    takeover_s: float = 30.0


LEASE_TIMING = LeaseTiming()
LOCK_POLL_S = 0.2

# Is told, once, whom a run waits for.
NotifyWaiting = Callable[[str], None]


class StoreHold:
    """The right to write one store, and with it the store's ledger; `hold_store` gives it."""

    def __init__(self, path: Location) -> None:
        self.path = path
        self.ledger = FailureLedger(path)

    def check(self) -> None:
        """Raise LeaseLostError when the right is gone; on a disk it can't be, the kernel keeps it."""


@contextmanager
def hold_store(
    place: Place,
    *,
    wait_s: float | None = None,
    notify: NotifyWaiting = lambda message: None,
    timing: LeaseTiming = LEASE_TIMING,
) -> Iterator[StoreHold]:
    """Hold the right to write a store until the block ends or the process dies.

    Args:
        place: the store, existing or not.
        wait_s: seconds to wait for another holder to end, math.inf for ever; None refuses at once.
        notify: is told whom it waits for.
        timing: of leases, which stores on a URL have; a lease whose process was killed is waited for in any case, until
            it has stood still for `takeover_s`; one that is counted up is refused as soon as that is seen.

    Raises StoreBusyError naming the holder, StoreReadOnlyError where nothing can be written.
    """
    path = locate(place)
    if path.is_remote:
        lease = _Lease(path, timing)
        lease.acquire(wait_s, notify)
        try:
            yield lease
        finally:
            lease.release()
        return
    with _locked(path, wait_s, notify):
        yield StoreHold(path)


def describe_holder(text: str | None) -> str:
    """Describe in words who holds a store, from the text of its `.holder.json`."""
    try:
        holder = json.loads(text or "")
        who = f"process {holder['pid']} of {holder['user']} on {holder['host']}"
        return f"{who} since {holder['when']} (dataset {holder.get('dataset', '?')})"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "an unknown process"


def _describe_self(path: Location) -> dict[str, Any]:
    return {"pid": os.getpid(), **describe_writer(), "dataset": path.parent.name}


def _busy(path: Location, holder: str) -> StoreBusyError:
    return StoreBusyError(f"{path} is being written by {holder}; wait for it with --wait, or stop it")


@contextmanager
def _locked(path: Location, wait_s: float | None, notify: NotifyWaiting) -> Iterator[None]:
    holder_file = path.beside(".holder.json")
    # Without the fallback: a lock that is only a file's existence would outlive a killed process.
    lock = FileLock(str(path.beside(".lock")), fallback_to_soft=False)
    path.make_parent()
    with telling_faults(path):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            holder = describe_holder(holder_file.read_text())
            if wait_s is None:
                raise _busy(path, holder) from error
            notify(f"waiting for {holder}, who writes {path}")
            try:
                lock.acquire(timeout=-1 if wait_s == float("inf") else wait_s, poll_interval=LOCK_POLL_S)
            except Timeout as still:
                raise _busy(path, describe_holder(holder_file.read_text())) from still
    try:
        # Who holds it is only told: on a full disk a run with nothing to do still ends well.
        with suppress(StoreFullError):
            holder_file.write_text(json.dumps(_describe_self(path)) + "\n")
        yield
    finally:
        holder_file.unlink()
        lock.release()


class _Lease(StoreHold):
    """A hold on a URL: the object `….holder.json`, which its holder's thread counts up."""

    def __init__(self, path: Location, timing: LeaseTiming) -> None:
        super().__init__(path)
        self._file = path.beside(".holder.json")
        self._timing = timing
        self._token = uuid.uuid4().hex
        self._beat = 0
        self._renewed_at = 0.0
        self._lost: str | None = None
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, wait_s: float | None, notify: NotifyWaiting) -> None:
        """Take the lease where there is none, or one that stood still while it was watched."""
        started = time.monotonic()
        notified = False
        while not self._file.create_text(self._text()):
            if not notified:
                holder = describe_holder(self._file.read_text())
                notify(f"{self.path} is held by {holder}; watching for up to {self._timing.takeover_s:g} s if it lives")
            found = self._watch()
            if found is None:
                continue
            text, version = found
            if version is not None:
                if self._file.replace_version(self._text(), version) and self._is_ours_after_settling(version):
                    break
                continue
            if wait_s is None or time.monotonic() - started > wait_s:
                raise _busy(self.path, describe_holder(text))
            if not notified:
                notify(f"waiting for {describe_holder(text)}, who writes {self.path}")
                notified = True
        self._renewed_at = time.monotonic()
        self._thread = threading.Thread(target=self._beat_on, name=f"lease of {self.path}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLostError when another process has the lease, or this one can't know for too long."""
        if self._lost is None and time.monotonic() - self._renewed_at > 2 * self._timing.beat_s:
            self._renew()  # the thread didn't come to it: this process may have been stopped for a while
        if self._lost is not None:
            raise LeaseLostError(
                f"{self.path}: {self._lost}; nothing more is written; what is committed is kept, "
                f"the same command goes on from there"
            )

    def release(self) -> None:
        """Stop counting and remove the lease, if it is still ours."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._lost is None and self._holds(self._file.read_text()):
            self._file.unlink()

    def _watch(self) -> tuple[str, str | None] | None:
        """Watch another's lease: None when it is gone, (text, None) when it lives, else (text, version to replace).

        Alive it is when the counter moves; dead when it stood still for `takeover_s` of our own monotonic clock.
        """
        first = self._file.read_version()
        started = time.monotonic()
        while first is not None and time.monotonic() - started < self._timing.takeover_s:
            time.sleep(self._timing.beat_s / 4)
            now = self._file.read_version()
            if now is None:
                return None
            if now[0] != first[0]:
                return now[0], None
        return first

    def _is_ours_after_settling(self, version: str) -> bool:
        """Return whether a lease that was taken over stayed ours; without conditional writes the last writer has it."""
        if not version:
            time.sleep(self._timing.beat_s)
        return self._holds(self._file.read_text())

    def _beat_on(self) -> None:
        while not self._ended.wait(self._timing.beat_s):
            self._renew()
            if self._lost is not None:
                return

    def _renew(self) -> None:
        """Count up, or notes that the lease is lost: taken by another, gone, or not renewed for too long."""
        with self._renewing:
            try:
                found = self._file.read_version()
                if found is None or not self._holds(found[0]):
                    by = "nobody" if found is None else describe_holder(found[0])
                    self._lost = f"the lease was taken from this process; it is held by {by}"
                    return
                self._beat += 1
                if not self._file.replace_version(self._text(), found[1]):
                    self._lost = "the lease was taken from this process while it was being renewed"
                    return
                self._renewed_at = time.monotonic()
            except StoreError as error:
                # One lost request is no lost lease; but others may take over what stands still.
                if time.monotonic() - self._renewed_at > self._timing.takeover_s / 2:
                    self._lost = f"the lease could not be renewed: {error}"

    def _holds(self, text: str | None) -> bool:
        try:
            return text is not None and json.loads(text).get("token") == self._token
        except json.JSONDecodeError:
            return False

    def _text(self) -> str:
        lease: Mapping[str, Any] = {**_describe_self(self.path), "token": self._token, "beat": self._beat}
        return json.dumps(lease) + "\n"
