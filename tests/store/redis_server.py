"""A Valkey server that a test can kill, restart on its directory, and wipe."""

import subprocess
import time
from pathlib import Path

import redis

from services.embedded import valkey_binary


class RedisServer:
    """On a unix socket in ``directory``; with ``keep`` its data outlive it, as with ``smoothkd up``."""

    def __init__(self, directory: Path, *, keep: bool = True) -> None:
        self.url = f"unix://{directory / 'valkey.sock'}"
        self._argv = [
            *(valkey_binary(), "--port", "0", "--unixsocket", directory / "valkey.sock"),
            *("--dir", directory, "--save", "", "--appendonly", "yes" if keep else "no"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._argv, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.flushall()
