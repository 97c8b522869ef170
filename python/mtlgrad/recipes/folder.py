"""The folder of one run: whole files or none, and one process at a time."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .recipe import TrainError

if sys.platform != "win32":  # there, two processes that resume one run are not told apart
    import fcntl

CHECKPOINT = "checkpoint.pt"
FORMAT = "mtlgrad train 3"  #: raised when an older checkpoint can no longer be continued


class NewFolder:
    """``out/name``, filled out of sight and then renamed: nobody ever sees half of it, and nothing is overwritten.

    Without a name it is date, time and `fallback`, numbered if that is taken. Left without :meth:`publish`, nothing
    remains, not even the folders above that were made for it.
    """

    def __init__(self, out: Path, name: str | None, fallback: str):
        self.out, self.name = out, name
        self.stem = name or time.strftime("%Y%m%d-%H%M%S-") + fallback
        self.work = out / f".new-{os.getpid()}"
        self.made: tuple[Path, ...] = ()  #: the folders above that did not exist before, innermost first

    def __enter__(self) -> NewFolder:
        try:
            if self.name is not None and (self.out / self.name).exists():
                raise self._taken()
            self.made = tuple(p for p in (self.out, *self.out.parents) if not p.exists())
            self.work.mkdir(parents=True)
        except OSError as error:
            remove_empty(self.made)
            raise self._unusable(error) from None
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.work.exists():
            shutil.rmtree(self.work, ignore_errors=True)
            remove_empty(self.made)
        if isinstance(error, OSError):
            raise self._unusable(error) from None

    def publish(self) -> Path:
        for number in range(1, 1000):
            path = self.out / (self.stem if number == 1 else f"{self.stem}-{number}")
            if not path.exists():
                try:
                    os.rename(self.work, path)
                    return path
                except OSError:
                    if not path.exists():  # else another process was faster
                        raise
            if self.name is not None:
                raise self._taken()
        raise TrainError(f"argument --out: {self.out} has a thousand runs of this second")

    def _taken(self) -> TrainError:
        path = self.out / self.stem
        resume = f", or --resume {path}" if (path / CHECKPOINT).exists() else ""
        return TrainError(f"argument --name: expected a new name, found {path}; take another{resume}")

    def _unusable(self, error: OSError) -> TrainError:
        reason = error.strerror or str(error)
        return TrainError(f"argument --out: expected a folder to write in, found {self.out}: {reason}; choose another")


class RunFolder:
    """``out/name``; every file is written to a temporary sibling and renamed, so a reader never sees half of one."""

    def __init__(self, path: Path, made: tuple[Path, ...] = ()):
        self.path = path
        self._made = made  # the folders above that did not exist before, innermost first
        self._lock = _lock(path)

    @staticmethod
    def create(out: Path, name: str | None, fallback: str, state: dict[str, Any]) -> RunFolder:
        """Make the folder with its first checkpoint inside, in one rename: two processes never share one."""
        with NewFolder(out, name, fallback) as new:
            _write(new.work / CHECKPOINT, _bytes({"format": FORMAT, **state}))
            return RunFolder(new.publish(), new.made)

    @staticmethod
    def open(path: Path) -> RunFolder:
        """Take a run to resume, given its folder or the checkpoint in it."""
        if not path.exists():
            raise TrainError(f"argument --resume: expected a run folder or its {CHECKPOINT}, found none at {path}")
        folder = path if path.is_dir() else path.parent
        read_checkpoint(folder)
        run = RunFolder(folder)
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while writing
            leftover.unlink(missing_ok=True)
        return run

    def write(self, name: str, content: bytes | str) -> None:
        try:
            _write(self.path / name, content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise TrainError(f"cannot write {self.path / name}: {error.strerror or error}; make room there") from None

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        self.write(CHECKPOINT, _bytes({"format": FORMAT, **state}))

    def close(self) -> None:
        """Let go of the folder; the end of the process does so too."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove a run in which nothing was finished, and the folders that were made for it."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
        remove_empty(self._made)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Read a run's state; every rank does."""
    file = folder / CHECKPOINT
    expected = f"argument --resume: expected a run folder or its {CHECKPOINT}"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise TrainError(f"{expected}, found {file}: {error.strerror or error}") from None
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if state["format"] == FORMAT:
            return state
    except Exception:  # damaged bytes raise nearly anything on their way through zip and pickle
        pass
    raise TrainError(
        f"{expected}, found {file}: damaged, or of another program or version; start anew without --resume"
    )


def _bytes(state: dict[str, Any]) -> bytes:
    # Not straight to the file: torch reports a full disk as an unrelated RuntimeError.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_empty(folders: tuple[Path, ...]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _lock(path: Path) -> int | None:
    """Hold the folder for this process; the system lets go when the process ends, however it ends."""
    if sys.platform == "win32":
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise TrainError(f"argument --resume: {path} is being written by another process; stop it or wait") from None
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle
