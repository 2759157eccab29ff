"""The label cache's promises: what is served is whole, what is kept is bounded, and kill -9 costs nothing."""

import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.contract.errors import InvalidInputError
from services.contract.sequences import LabelOptions
from services.labels.cache import LabelCache, label_key
from services.labels.entry import bytes_on_disk
from tests.labels.writer import key_of, payload_of

REPOSITORY = Path(__file__).parents[2]
GIB = 1024**3


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[LabelCache]:
    with LabelCache(tmp_path / "labels", max_bytes=GIB) as cache:
        yield cache


def files(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / "entries").rglob("*") if path.is_file())


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in files(directory))


def writers(directory: Path, *, count: int, max_bytes: int, seed: int, puts: int) -> list[subprocess.Popen]:
    """Processes that put and get at once; they report on stdout."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.labels.writer", directory, str(max_bytes), str(seed + number), str(puts)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def test_what_was_put_is_found_again_also_by_another_process_and_after_a_restart(tmp_path: Path) -> None:
    with LabelCache(tmp_path, max_bytes=GIB) as cache, LabelCache(tmp_path, max_bytes=GIB) as replica:
        assert cache.get(key_of(1)) is None
        cache.put(key_of(1), payload_of(1))
        cache.put(key_of(2), b"")
        assert replica.get(key_of(1)) == payload_of(1)
        assert replica.get(key_of(2)) == b""
        stats = cache.stats()
        assert stats.since_start.misses == 1
        assert stats.since_start.stored == 2
        assert replica.stats().since_start.hits == 2
    with LabelCache(tmp_path, max_bytes=GIB) as again:
        assert again.get(key_of(1)) == payload_of(1)
        stats = again.stats()
        assert (stats.entries, stats.bytes) == (2, bytes_of(tmp_path))
        assert (stats.ever.hits, stats.ever.misses, stats.ever.stored) == (3, 1, 2)


def test_a_hit_writes_nothing_by_itself(cache: LabelCache) -> None:
    cache.put(key_of(1), payload_of(1))
    index = cache.directory / "index.sqlite-wal"
    cache.stats()
    before = (index.stat().st_size, index.stat().st_mtime_ns)
    for _ in range(100):
        cache.get(key_of(1))
    assert (index.stat().st_size, index.stat().st_mtime_ns) == before
    assert cache.stats().ever.hits == 100


def flipped(content: bytes, place: int) -> bytes:
    """With one bit other."""
    changed = bytearray(content)
    changed[place] ^= 4
    return bytes(changed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content, other: b"",
        lambda content, other: content[:40],
        lambda content, other: content[:-1],
        lambda content, other: content + b"x",
        lambda content, other: other,
        lambda content, other: b"#!/bin/sh\n" * 100,
        *(lambda content, other, place=place: flipped(content, place) for place in (0, 9, 20, 50, 70, -1)),
    ],
)
def test_an_entry_that_is_not_whole_is_dropped_aloud_and_never_served(
    damage, cache: LabelCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put(key_of(1), payload_of(1))
    cache.put(key_of(2), payload_of(2))
    path, other = (next(cache.directory.rglob(key_of(number))) for number in (1, 2))
    path.write_bytes(damage(path.read_bytes(), other.read_bytes()))
    assert cache.get(key_of(1)) is None
    assert str(path) in caplog.text
    assert not path.exists()
    assert cache.get(key_of(2)) == payload_of(2)
    stats = cache.stats()
    assert (stats.entries, stats.since_start.damaged, stats.since_start.misses) == (1, 1, 1)
    cache.put(key_of(1), payload_of(1))
    assert cache.get(key_of(1)) == payload_of(1)


def test_those_unused_longest_go_first(tmp_path: Path) -> None:
    room = 5 * bytes_on_disk(len(payload_of(0)))
    with LabelCache(tmp_path, max_bytes=room) as cache:
        for number in range(5):
            cache.put(key_of(number), payload_of(0))
        assert cache.get(key_of(0)) is not None
        assert cache.get(key_of(1)) is not None
        cache.stats()
        for number in (5, 6, 7):
            cache.put(key_of(number), payload_of(0))
        there = [number for number in range(8) if cache.get(key_of(number)) is not None]
        assert there == [0, 1, 5, 6, 7]
        assert cache.stats().since_start.evicted == 3
        assert bytes_of(tmp_path) <= room


def test_labels_larger_than_the_bound_are_not_kept_and_push_nothing_out(tmp_path: Path) -> None:
    with LabelCache(tmp_path, max_bytes=8192) as cache:
        cache.put(key_of(1), b"x" * 4000)
        cache.put(key_of(2), b"x" * 9000)
        assert cache.get(key_of(1)) == b"x" * 4000
        assert cache.get(key_of(2)) is None


def test_threads_share_a_cache(cache: LabelCache) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(200):
            number = draw.randrange(30)
            found = cache.get(key_of(number))
            if found is None:
                cache.put(key_of(number), payload_of(number))
            elif found != payload_of(number):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.stats().entries == 30


def test_the_bound_holds_while_several_processes_write(tmp_path: Path) -> None:
    bound = 2_000_000
    running = writers(tmp_path, count=3, max_bytes=bound, seed=0, puts=400)
    largest = 0
    while any(process.poll() is None for process in running):
        # Files may go while they are being counted.
        total = 0
        for path in files(tmp_path) if (tmp_path / "entries").exists() else []:
            try:
                total += path.stat().st_blocks * 512
            except FileNotFoundError:
                continue
        largest = max(largest, total)
    for process in running:
        out, _ = process.communicate()
        assert process.returncode == 0
        assert out.splitlines()[-1] == "done, 0 wrong"
    with LabelCache(tmp_path, max_bytes=bound) as cache:
        stats = cache.stats()
    assert stats.bytes == bytes_of(tmp_path)
    assert bound / 2 < stats.bytes <= bound
    # Counting is not atomic: an entry seen before it was replaced by another counts beside that one.
    assert bound / 2 < largest <= 1.5 * bound
    assert stats.ever.evicted > 100


def test_kill_9_at_any_moment_leaves_a_usable_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """20 processes killed while they open, write and evict; a replica that lives on is not disturbed."""
    bound = 1_000_000
    draw = random.Random(7)
    whole = {payload_of(number) for number in range(300)}
    with LabelCache(tmp_path, max_bytes=bound) as survivor:
        for attempt in range(20):
            (process,) = writers(tmp_path, count=1, max_bytes=bound, seed=100 + attempt, puts=100_000)
            assert process.stdout is not None
            for _ in range(draw.randrange(0, 300)):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            process.communicate()
            survivor.put(key_of(10_000 + attempt), payload_of(attempt))
            assert survivor.get(key_of(10_000 + attempt)) == payload_of(attempt)
            with LabelCache(tmp_path, max_bytes=bound) as cache:
                assert len(list((tmp_path / "writing").iterdir())) == 2
                for path in files(tmp_path):
                    found = cache.get(path.name)
                    assert found in whole
                assert bytes_of(tmp_path) <= cache.stats().bytes <= bound
                cache.put(key_of(20_000 + attempt), payload_of(attempt))
                assert cache.get(key_of(20_000 + attempt)) == payload_of(attempt)
    assert "drops" not in caplog.text


def test_what_had_to_go_while_it_was_being_written_does_not_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else there would be a file that nobody counts."""
    from services.labels import cache as module

    plain = module.write_entry
    with LabelCache(tmp_path, max_bytes=GIB) as cache, LabelCache(tmp_path, max_bytes=GIB) as replica:

        def write_slowly(path: Path, **entry: object) -> None:
            plain(path, **entry)
            replica.clear()

        monkeypatch.setattr(module, "write_entry", write_slowly)
        cache.put(key_of(1), payload_of(1))
        assert files(tmp_path) == []
        assert cache.stats().entries == 0
        assert not list(cache._shelf.writing.glob("[0-9]*"))


@pytest.mark.parametrize("damage", ["missing", "garbage", "cut", "unfinished"])
def test_the_index_is_made_anew_from_the_files_aloud(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LabelCache(tmp_path, max_bytes=GIB) as cache:
        for number in range(300):
            cache.put(key_of(number), payload_of(number))
        expected = cache.stats()
    index = tmp_path / "index.sqlite"
    if damage == "missing":
        index.unlink()
    elif damage == "garbage":
        index.write_bytes(b"no database " * 1000)
    elif damage == "cut":
        os.truncate(index, index.stat().st_size // 2)
    else:
        with sqlite3.connect(index) as database:
            database.execute("PRAGMA user_version = 0")
        database.close()
    with LabelCache(tmp_path, max_bytes=GIB) as cache:
        stats = cache.stats()
        assert (stats.entries, stats.bytes) == (expected.entries, expected.bytes)
        assert cache.get(key_of(7)) == payload_of(7)
    assert "made it anew from 300 entries" in caplog.text


def test_a_running_cache_outlives_the_loss_of_its_index_and_of_everything(tmp_path: Path) -> None:
    with LabelCache(tmp_path / "labels", max_bytes=GIB) as cache:
        cache.put(key_of(1), payload_of(1))
        for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
            (tmp_path / "labels" / name).unlink(missing_ok=True)
        cache.put(key_of(2), payload_of(2))
        assert cache.stats().entries == 2
        shutil.rmtree(tmp_path / "labels")
        assert cache.get(key_of(1)) is None
        cache.put(key_of(3), payload_of(3))
        assert cache.get(key_of(3)) == payload_of(3)
        assert cache.stats().entries == 1
        assert cache.stats().since_start.failed == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_fills_up_costs_old_entries_and_never_a_request(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LabelCache(small_disk / "labels", max_bytes=GIB, reserve_bytes=0) as cache:
        for number in range(100):
            cache.put(key_of(number), os.urandom(100_000))
        stats = cache.stats()
        assert stats.since_start.evicted > 50
        assert stats.entries > 20
        assert cache.get(key_of(99)) is not None
        # Somebody else takes what is left.
        subprocess.run(["dd", "if=/dev/zero", f"of={small_disk / 'other'}"], capture_output=True)
        assert shutil.disk_usage(small_disk).free == 0
        for number in range(200, 220):
            cache.put(key_of(number), payload_of(number))
            cache.get(key_of(number))
        assert cache.get(key_of(219)) == payload_of(219)
    assert sum("full" in record.message or "no room" in record.message for record in caplog.records) <= 1


def test_a_disk_fuller_than_it_says_is_met_by_giving_space_back(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a quota: writing itself fails, with the file system's own ENOSPC."""
    with LabelCache(small_disk / "labels", max_bytes=GIB, reserve_bytes=0) as cache:
        monkeypatch.setattr(cache._shelf, "free_bytes", lambda: GIB)
        for number in range(100):
            cache.put(key_of(number), os.urandom(100_000))
            assert cache.get(key_of(number)) is not None
        stats = cache.stats()
        assert stats.since_start.failed == 0
        assert stats.since_start.evicted >= 60
        assert stats.entries > 10
    assert sum("the disk of" in record.message for record in caplog.records) == 1
    assert "cannot keep" not in caplog.text


def test_the_reserve_of_the_file_system_stays_free(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with LabelCache(small_disk / "labels", max_bytes=GIB, reserve_bytes=2_000_000) as cache:
        for number in range(60):
            cache.put(key_of(number), os.urandom(100_000))
            assert cache._shelf.free_bytes() >= 1_900_000
        assert cache.stats().entries > 5
        (small_disk / "other").write_bytes(b"x" * 1_500_000)
        cache.put(key_of(100), b"x" * 100_000)
        assert cache.stats().bytes <= 500_000
    with LabelCache(small_disk / "labels", max_bytes=GIB) as cache:
        cache.put(key_of(101), b"x")
        assert cache.stats().since_start.failed == 1
        assert cache.get(key_of(101)) is None
    # Once for each of the two caches.
    assert caplog.text.count("no room for labels") == 2


def test_a_limit_on_file_sizes_is_met_like_a_full_disk(tmp_path: Path) -> None:
    """A write that the kernel refuses in the middle of an entry."""
    code = (
        "import resource, sys, logging; logging.basicConfig()\n"
        "from pathlib import Path\n"
        "from services.labels.cache import LabelCache\n"
        "cache = LabelCache(Path(sys.argv[1]), max_bytes=2**30)\n"
        "cache.put('aa' * 32, b'small')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "for number in range(5): cache.put(f'{number:064x}', b'x' * 400_000)\n"
        "assert cache.stats().since_start.failed == 5, cache.stats()\n"
        "cache.put('bb' * 32, b'small'); assert cache.get('bb' * 32) == b'small'\n"
        "assert not list(cache._shelf.writing.glob('[0-9]*'))\n"
        "cache.close()\n"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("cannot keep labels") == 1


def test_a_directory_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    with pytest.raises(InvalidInputError, match=f"{file}.*"):
        LabelCache(file, max_bytes=GIB)
    with pytest.raises(InvalidInputError, match="cannot use"):
        LabelCache(file / "below", max_bytes=GIB)


@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_a_directory_of_another_user_is_refused_at_the_start(mode: int, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    directory = tmp_path / "labels"
    LabelCache(directory, max_bytes=GIB).close()
    directory.chmod(mode)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom services.contract.errors import InvalidInputError\n"
        "from services.labels.cache import LabelCache\nos.chdir('/'); os.setuid(65534)\n"
        "try: LabelCache(Path(sys.argv[1]), max_bytes=1)\n"
        "except InvalidInputError as error: sys.exit(0 if 'SMOOTHKD_LABEL_CACHE_DIR' in error.fix else 3)\n"
    )
    for parent in [directory, *directory.parents]:
        if parent.stat().st_uid == 0 and parent != directory and parent.is_relative_to(tmp_path.parents[1]):
            parent.chmod(0o755)
    result = subprocess.run([sys.executable, "-c", code, directory], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_clear_deletes_all_labels(cache: LabelCache) -> None:
    for number in range(10):
        cache.put(key_of(number), payload_of(number))
    cache.clear()
    assert files(cache.directory) == []
    assert (cache.stats().entries, cache.stats().bytes) == (0, 0)
    cache.put(key_of(1), payload_of(1))
    assert cache.get(key_of(1)) == payload_of(1)


def test_uses_are_noted_in_the_background(cache: LabelCache, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cache.put(key_of(1), payload_of(1))
    ends = time.monotonic() + 30
    while cache._index.counts().get("stored") != 1:
        assert time.monotonic() < ends


BASE = {"fingerprint": "f", "sequence_hash": b"s" * 32, "label_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("encoding", "counted"),
    [
        ("exact", {"fingerprint", "sequence_hash", "label_dtype"}),
        ("full", {"fingerprint", "sequence_hash"}),
        ("top_k", {"fingerprint", "sequence_hash", "k", "temperature"}),
        ("sampled", {"fingerprint", "sequence_hash", "draws", "seed", "temperature"}),
        ("projected", {"fingerprint", "sequence_hash", "label_dtype", "student_head", "temperature"}),
    ],
)
def test_the_key_holds_what_decides_the_labels_and_nothing_else(encoding: str, counted: set[str]) -> None:
    changes = {
        "fingerprint": "g",
        "sequence_hash": b"t" * 32,
        "label_dtype": "float32",
        "k": 9,
        "temperature": 2.0,
        "draws": 9,
        "seed": 9,
        "student_head": "h",
    }
    key = label_key(options=LabelOptions(encoding=encoding), **BASE)
    differing = set()
    for name, value in changes.items():
        if name in BASE:
            other = label_key(options=LabelOptions(encoding=encoding), **(BASE | {name: value}))
        else:
            other = label_key(options=LabelOptions(encoding=encoding, **{name: value}), **BASE)
        if other != key:
            differing.add(name)
    assert differing == counted


def test_encodings_never_share_a_key() -> None:
    encodings = ("exact", "full", "top_k", "sampled", "projected")
    assert len({label_key(options=LabelOptions(encoding=encoding), **BASE) for encoding in encodings}) == 5
