"""What may stand where an entry of the label cache should: it is dropped aloud, computed again, and harms no other."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from services.labels.cache import LabelCache
from tests.labels.writer import key_of, payload_of

REPOSITORY = Path(__file__).parents[2]
GIB = 1024**3


def directory(path: Path) -> None:
    path.mkdir()


def full_directory(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("x")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def file_for_folder(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_text("no folder")


OBSTACLES = [directory, full_directory, pipe, link_to_itself, link_to_a_device, file_for_folder]


def put_in_place_of(cache: LabelCache, number: int, obstacle: Callable[[Path], None]) -> Path:
    path = next(cache.directory.rglob(key_of(number)))
    path.unlink()
    obstacle(path)
    return path


@pytest.mark.timeout(30)
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_an_obstacle_is_dropped_aloud_and_makes_way(
    obstacle: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LabelCache(tmp_path / "labels", max_bytes=GIB) as cache:
        for number in (1, 2):
            cache.put(key_of(number), payload_of(number))
        path = put_in_place_of(cache, 1, obstacle)
        assert cache.get(key_of(1)) is None
        assert f"drops {path}" in caplog.text
        assert cache.get(key_of(2)) == payload_of(2)
        assert cache.stats().since_start.damaged == 1
        cache.put(key_of(1), payload_of(1))
        assert cache.get(key_of(1)) == payload_of(1)
        assert cache.stats().entries == 2


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_cache_with_an_obstacle_is_opened_evicted_and_cleared(
    obstacle: Callable[[Path], None], tmp_path: Path
) -> None:
    with LabelCache(tmp_path, max_bytes=GIB) as cache:
        for number in (1, 2):
            cache.put(key_of(number), payload_of(number))
        put_in_place_of(cache, 1, obstacle)
    (tmp_path / "index.sqlite").unlink()
    with LabelCache(tmp_path, max_bytes=GIB) as cache:
        assert cache.get(key_of(2)) == payload_of(2)
        cache.clear()
        assert cache.stats().entries == 0
        cache.put(key_of(1), payload_of(1))
        assert cache.get(key_of(2)) is None
    with LabelCache(tmp_path, max_bytes=4096) as cache:
        if obstacle is not file_for_folder:
            put_in_place_of(cache, 1, obstacle)
        cache.put(key_of(3), b"small")
        assert cache.get(key_of(3)) == b"small"
        assert cache.stats().entries == 1


def test_an_entry_that_may_not_be_read_is_dropped_aloud(tmp_path: Path) -> None:
    """As any user but root, who may read everything."""
    code = (
        "import logging, os, sys, tempfile; logging.basicConfig()\n"
        "from pathlib import Path\n"
        "from services.labels.cache import LabelCache\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "with tempfile.TemporaryDirectory() as folder, LabelCache(Path(folder), max_bytes=2**30) as cache:\n"
        "    one, two = 'aa' * 32, 'ab' * 32\n"
        "    for key in (one, two): cache.put(key, b'labels')\n"
        "    next(Path(folder).rglob(one)).chmod(0)\n"
        "    assert cache.get(one) is None\n"
        "    cache.put(one, b'labels')\n"
        "    assert cache.get(one) == cache.get(two) == b'labels'\n"
        "    next(Path(folder).rglob(one)).chmod(0)\n"
        "    (Path(folder) / 'entries' / 'aa').chmod(0o500)\n"
        "    assert cache.get(one) is cache.get(one) is None\n"
        "    cache.put(one, b'labels')\n"
        "    assert cache.get(two) == b'labels'\n"
        "    (Path(folder) / 'entries' / 'aa').chmod(0o700)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Permission denied; the teacher computes these labels again") == 1
    assert result.stderr.count("cannot drop") == 1


def test_a_process_without_file_descriptors_drops_nothing(tmp_path: Path) -> None:
    code = (
        "import os, resource, sys\n"
        "from pathlib import Path\n"
        "from services.labels.cache import LabelCache\n"
        "with LabelCache(Path(sys.argv[1]), max_bytes=2**30) as cache:\n"
        "    cache.put('aa' * 32, b'labels')\n"
        "    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (os.open('/', os.O_RDONLY), hard))\n"
        "    assert cache.get('aa' * 32) is None\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "    assert cache.get('aa' * 32) == b'labels'\n"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
