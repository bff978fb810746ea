"""Where a teacher cache lies: a local folder or any pyarrow/fsspec file system, and who may write to it.

Files are read and written whole. A local file appears under its name only when it is complete and on disk; so
does an object of S3, GCS or Azure. Elsewhere a killed writer may leave a truncated file, which readers find by
its checksum.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from mamtra_ray.artifacts import disk_full_is_said, written_atomically
from mamtra_ray.errors import InputError

LOCK_FILE = "writer.lock"
# A remote file system has no lock that dies with its holder, so the holder renews it every few seconds.
LEASE_SECONDS = 60.0
_RENEW_SECONDS = 10.0


@dataclass(frozen=True)
class Storage:
    """A folder; cheap to pickle, opened where it is used.

    Attributes:
        location: local path or URI (``s3://bucket/folder?endpoint_override=...``, ``gs://...``, ``memory://...``).
    """

    location: str

    @classmethod
    def of(cls, location: Storage | Path | str) -> Storage:
        """Local paths become absolute, because Ray workers run elsewhere."""
        if isinstance(location, Storage):
            return location
        text = str(location).removeprefix("file://")
        return cls(text if "://" in text else str(Path(text).expanduser().absolute()))

    def __str__(self) -> str:
        """For messages: without options and without an access key."""
        return re.sub(r"(?<=://)[^/@]*@", "", self.location.split("?")[0]).rstrip("/")

    @property
    def local_folder(self) -> Path | None:
        return None if "://" in self.location else Path(self.location)

    def child(self, name: str) -> str:
        """What to call a file of the folder in a message."""
        return f"{self}/{name}"

    def names(self) -> list[str]:
        """Names of the files directly in the folder, sorted; empty if it does not exist."""
        filesystem, root = self._opened()
        with self._clear_errors("list"):
            infos = filesystem.get_file_info(pa.fs.FileSelector(root, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == pa.fs.FileType.File)

    def read(self, name: str) -> pa.Buffer:
        """The whole content of a file.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: the file system fails otherwise.
        """
        filesystem, root = self._opened()
        with self._clear_errors("read", name), filesystem.open_input_file(f"{root}/{name}") as file:
            return file.read_buffer()

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a file whole; a full disk or a refused upload leaves what was there before.

        Raises:
            InputError: the file system has no space left or fails otherwise.
        """
        with self._clear_errors("write", name):
            if self.local_folder is not None:
                with written_atomically(self.local_folder / name) as temporary, temporary.open("wb") as file:
                    file.write(content)
                return
            filesystem, root = self._opened()
            filesystem.create_dir(root, recursive=True)
            with filesystem.open_output_stream(f"{root}/{name}") as file:
                file.write(content)

    def delete(self, name: str) -> None:
        filesystem, root = self._opened()
        with self._clear_errors("delete", name):
            filesystem.delete_file(f"{root}/{name}")

    def remove_unfinished(self) -> None:
        """Delete what killed writers left behind under temporary names; only the holder of the lock may."""
        if self.local_folder is not None:
            for path in self.local_folder.glob(".*.partial"):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one job writes to the folder at a time.

        Locally the operating system drops the lock of a killed process at once. Remotely the lock is a lease
        that its holder renews; a job that finds one waits until it runs out.

        Raises:
            InputError: another job holds the lock.
        """
        holder = {"host": socket.gethostname(), "pid": os.getpid()}
        if self.local_folder is None:
            with self._leased(holder):
                yield
            return
        with self._clear_errors("write", LOCK_FILE):
            self.local_folder.mkdir(parents=True, exist_ok=True)
            file = (self.local_folder / LOCK_FILE).open("ab+", buffering=0)
        with file:
            with self._clear_errors("lock"):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.seek(0)
                    raise self._taken(file.read().decode(errors="replace")) from None
            # Only for the message above: a full disk stops no job that has nothing to write.
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(json.dumps(holder).encode())
            yield

    @contextlib.contextmanager
    def _leased(self, holder: dict[str, object]) -> Iterator[None]:
        deadline = time.monotonic() + 1.5 * LEASE_SECONDS
        while (lease := self._read_lease()) and time.time() - lease["renewed"] < LEASE_SECONDS:
            if time.monotonic() > deadline:
                raise self._taken(json.dumps(lease))
            time.sleep(2)
        mine = {**holder, "token": os.urandom(8).hex()}
        self._write_lease(mine)
        # Two jobs may have written at once: the last writer stays, the other one sees that here.
        time.sleep(1)
        if (lease := self._read_lease()) is None or lease["token"] != mine["token"]:
            raise self._taken(json.dumps(lease))
        stopped = threading.Event()

        def is_mine() -> bool:
            return (lease := self._read_lease()) is not None and lease["token"] == mine["token"]

        def renew() -> None:
            # After a longer sleep another job may hold it; both write equal shards, so this one goes on.
            while not stopped.wait(_RENEW_SECONDS):
                with contextlib.suppress(InputError):
                    if is_mine():
                        self._write_lease(mine)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            with contextlib.suppress(InputError, FileNotFoundError):
                if is_mine():
                    self.delete(LOCK_FILE)

    def _read_lease(self) -> dict | None:
        try:
            return json.loads(self.read(LOCK_FILE).to_pybytes())
        except (FileNotFoundError, ValueError):
            return None

    def _write_lease(self, holder: dict[str, object]) -> None:
        self.write(LOCK_FILE, json.dumps({**holder, "renewed": time.time()}).encode())

    def _taken(self, holder: str) -> InputError:
        try:
            who = "process {pid} on {host}".format(**json.loads(holder))
        except (ValueError, KeyError, TypeError):
            who = "another process"
        return InputError(f"{self} is being written by {who}; wait until it has finished, or stop it")

    def _opened(self) -> tuple[pa.fs.FileSystem, str]:
        if self.local_folder is not None:
            return pa.fs.LocalFileSystem(), self.location
        try:
            filesystem, path = pa.fs.FileSystem.from_uri(self.location)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError):
            filesystem, path = self._opened_by_fsspec()
        return filesystem, path.rstrip("/")

    def _opened_by_fsspec(self) -> tuple[pa.fs.FileSystem, str]:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(self.location)
        except (ValueError, ImportError, OSError) as error:
            raise InputError(f"no file system opens {self}: {' '.join(str(error).split())}") from None
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(filesystem)), path

    @contextlib.contextmanager
    def _clear_errors(self, action: str, name: str | None = None) -> Iterator[None]:
        where = str(self) if name is None else self.child(name)
        try:
            with disk_full_is_said(where, action):
                yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            reason = re.sub(r"\s+", " ", str(error))
            raise InputError(f"cannot {action} {where}: {reason}") from None
