"""The directory of a label cache: where entries lie, where they are written, and whose half-written files they are.

entries/3f/3f9c…        one file per entry, in 256 folders
writing/RANDOM/         files under way of one process, which holds a lock on alive in there as long as it lives
index.sqlite            see services/labels/index.py
lock                    held while the cache is opened or its index rebuilt
"""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.contract.errors import InvalidInputError

log = logging.getLogger(__name__)


class Shelf:
    """The directory, made where it is absent. ``writing`` is this process's own folder for files under way.

    InvalidInputError where the directory cannot be made, read or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self._make_folders()
            with self.opening():
                self.writing, self._alive = self._own_folder()
        except OSError as error:
            raise unusable(directory, error.strerror or str(error)) from None
        for folder in (directory, directory / "entries"):
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
                raise unusable(directory, f"{folder} may not be read and written by this user")

    def entry(self, key: str) -> Path:
        """Where the entry of a key lies or would lie; keys are 64 hex digits."""
        return self.directory / "entries" / key[:2] / key

    def remove(self, key: str) -> None:
        """Delete the entry of a key, or whatever has come into its place."""
        path = self.entry(key)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            path.parent.unlink(missing_ok=True)
        except OSError:
            if path.is_symlink() or not path.is_dir():
                raise
            shutil.rmtree(path)

    def entries(self) -> Iterator[os.DirEntry[str]]:
        """The files of all entries; what has no name of an entry is somebody else's and left alone."""
        with os.scandir(self.directory / "entries") as folders:
            for folder in folders:
                if folder.is_dir(follow_symlinks=False):
                    try:
                        with os.scandir(folder) as files:
                            found = [file for file in files if is_key(file.name) and file.name[:2] == folder.name]
                    except OSError as error:
                        log.warning("the label cache leaves out what it cannot read: %s", error)
                        continue
                    yield from found

    @contextmanager
    def opening(self) -> Iterator[None]:
        """One process at a time opens the cache or rebuilds its index; a lock of the kernel's ends with its holder."""
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def free_bytes(self) -> int:
        """What this user may still write on the file system."""
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize

    def restore(self) -> None:
        """Make the folders again after somebody removed them under a running cache."""
        self._make_folders()
        with self.opening():
            if not self.writing.exists():
                os.close(self._alive)
                self.writing.mkdir()
                self._alive = _hold(self.writing)

    def close(self) -> None:
        """Give up the folder for files under way."""
        shutil.rmtree(self.writing, ignore_errors=True)
        os.close(self._alive)

    def _make_folders(self) -> None:
        for name in ("entries", "writing"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)

    def _own_folder(self) -> tuple[Path, int]:
        for folder in (self.directory / "writing").iterdir():
            if _owner_is_dead(folder):
                log.info("removing what a process that ended left half-written in %s", folder)
                shutil.rmtree(folder, ignore_errors=True)
        own = Path(tempfile.mkdtemp(dir=self.directory / "writing"))
        return own, _hold(own)


def is_key(name: str) -> bool:
    """Whether this is a key: 64 lower-case hex digits."""
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


def unusable(directory: Path, why: str) -> InvalidInputError:
    """The error for a directory that cannot hold a label cache."""
    return InvalidInputError(
        f"the label cache cannot use {directory}: {why}",
        fix="Name a directory that this user may read and write as SMOOTHKD_LABEL_CACHE_DIR, or keep no labels "
        "with SMOOTHKD_LABEL_CACHE_GIB=0.",
    )


def _hold(folder: Path) -> int:
    descriptor = os.open(folder / "alive", os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _owner_is_dead(folder: Path) -> bool:
    # Process ids are not asked: they are used again, and mean nothing to another container on the same directory.
    try:
        descriptor = os.open(folder / "alive", os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
