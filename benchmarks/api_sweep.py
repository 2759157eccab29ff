"""POST of a sweep of 1,000 runs: time against the target of one second, and against the bare store.

Then 200 concurrent POSTs with one Idempotency-Key, which must make one sweep. Everything is real: HTTP over
loopback, SQLite on disk, Valkey; only the teacher is not asked, because the sweep is SFT.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.report import report
from services.contract.spec import SweepSpec, expand
from services.contract.spec_reading import parse_sweep
from services.embedded import valkey_binary
from services.store.store import Store

TARGET_SECONDS = 1.0
REPEATS = 5
SPEC = {
    "name": "thousand",
    "student": {"model": "owner/student"},
    "dataset": {"path": "demo_instructions"},
    "grid": {
        "alpha": 0,
        "learning_rate": [1e-6 * step for step in range(1, 11)],
        "batch_size": [2, 4, 8, 16],
        "seed": list(range(25)),
    },
    "evaluation": {"benchmarks": ["demo_news"]},
}


def main() -> None:
    spec = parse_sweep(SPEC)
    assert len(expand(spec)) == 1000
    with tempfile.TemporaryDirectory() as folder:
        bare = measure_store(spec, Path(folder) / "bare.db")
        with api_process(Path(folder)) as url, httpx.Client(base_url=url, timeout=60) as http:
            posted = measure_posts(http, spec)
            sweeps = count_after_concurrent_posts(http, spec)
    rows = [
        {
            "POST of 1,000 runs, s": posted,
            "share of the target": posted / TARGET_SECONDS,
            "times the store alone": posted / bare,
            "sweeps after 200 concurrent POSTs with one key": sweeps,
        }
    ]
    report("api_sweep", title=f"a sweep of 1,000 runs, target {TARGET_SECONDS:g} s", rows=rows)


def measure_store(spec: SweepSpec, path: Path) -> float:
    """Median seconds of Store.create_sweep."""
    store = Store(f"sqlite:///{path}")
    seconds = [timed(lambda: store.create_sweep(spec)) for _ in range(REPEATS)]
    store.close()
    return statistics.median(seconds)


def measure_posts(http: httpx.Client, spec: SweepSpec) -> float:
    """Median seconds of POST /v1/sweeps."""
    body = spec.model_dump_json()

    def post() -> None:
        http.post("/v1/sweeps", content=body, headers={"Content-Type": "application/json"}).raise_for_status()

    post()
    return statistics.median(timed(post) for _ in range(REPEATS))


def count_after_concurrent_posts(http: httpx.Client, spec: SweepSpec) -> int:
    """Distinct sweeps in the answers to 200 equal POSTs."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": "one"}
    body = spec.model_dump_json()
    with ThreadPoolExecutor(50) as threads:
        answers = threads.map(lambda _: http.post("/v1/sweeps", content=body, headers=headers), range(200))
        return len({answer.raise_for_status().json()["id"] for answer in answers})


def timed(action: object) -> float:
    assert callable(action)
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@contextmanager
def api_process(folder: Path) -> Iterator[str]:
    """The address of `smoothkd api` with a queue of its own."""
    valkey_port, api_port = free_port(), free_port()
    environment = os.environ | {
        "SMOOTHKD_DATA_DIR": str(folder),
        "SMOOTHKD_REDIS_URL": f"redis://127.0.0.1:{valkey_port}/0",
        "SMOOTHKD_API_PORT": str(api_port),
        "SMOOTHKD_OFFLINE": "1",
    }
    valkey = subprocess.Popen(
        [valkey_binary(), "--port", str(valkey_port), "--save", "", "--dir", folder], stdout=subprocess.DEVNULL
    )
    api = subprocess.Popen(
        [sys.executable, "-m", "services.cli.main", "api"], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{api_port}"
        wait_until_ready(url, api)
        yield url
    finally:
        for process in (api, valkey):
            process.terminate()
            process.wait()


def wait_until_ready(url: str, api: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and api.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the API did not become ready")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
