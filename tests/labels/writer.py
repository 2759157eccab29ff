"""A process that works a label cache hard: ``python -m tests.labels.writer DIRECTORY MAX_BYTES SEED PUTS``."""

import hashlib
import random
import sys
from pathlib import Path

from services.labels.cache import LabelCache


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def payload_of(number: int) -> bytes:
    """1 to 60 KB that depend on the number alone."""
    return random.Random(number).randbytes(1000 + number * 7919 % 59_000)


def main() -> None:
    directory, max_bytes, seed, puts = sys.argv[1:]
    draw = random.Random(int(seed))
    wrong = 0
    sys.stdout.write("opening\n")
    sys.stdout.flush()
    with LabelCache(Path(directory), max_bytes=int(max_bytes)) as cache:
        for _ in range(int(puts)):
            number = draw.randrange(300)
            found = cache.get(key_of(number))
            if found is None:
                cache.put(key_of(number), payload_of(number))
            else:
                wrong += found != payload_of(number)
            sys.stdout.write(".\n")
            sys.stdout.flush()
        failed = cache.stats().since_start.failed
    assert failed == 0, failed
    sys.stdout.write(f"done, {wrong} wrong\n")


if __name__ == "__main__":
    main()
