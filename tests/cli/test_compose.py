"""The compose file's own commands, ports and health checks, run as processes in place of containers."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from services.cli.supervisor import STOP_SECONDS
from services.embedded import valkey_binary
from teacher_server.options import TeacherOptions

REPOSITORY = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
OURS = {
    "api": "services/api/Dockerfile",
    "teacher": "teacher_server/Dockerfile",
    "worker": "student_trainer/Dockerfile",
    "dashboard": "dashboard/Dockerfile",
}
SMOOTHKD = [sys.executable, "-m", "services.cli.main"]


def test_every_service_is_checked_and_restarts():
    for name, service in SERVICES.items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["restart"] == "unless-stopped", name
    assert set(SERVICES) == {*OURS, "redis", "postgres", "teacher-gpu", "worker-gpu"}
    named = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert named == set(COMPOSE["volumes"])


def test_gpu_services_need_their_profile():
    for name in ("teacher-gpu", "worker-gpu"):
        assert SERVICES[name]["profiles"] == ["gpu"]
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def test_only_api_and_dashboard_are_published_and_only_to_this_host():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:8440:8440"], "dashboard": ["127.0.0.1:8441:8441"]}


def test_all_who_ask_the_teacher_share_its_token():
    tokens = {name: service.get("environment", {}).get("SMOOTHKD_TEACHER_TOKEN") for name, service in SERVICES.items()}
    of_the_teacher = "${SMOOTHKD_TEACHER_TOKEN:-change-me}"
    assert {name for name, token in tokens.items() if token == of_the_teacher} == {
        *("api", "teacher", "teacher-gpu", "worker", "worker-gpu")
    }
    assert {token for token in tokens.values() if token} == {of_the_teacher}


def test_a_stopping_teacher_has_time_to_drain():
    seconds = int(SERVICES["teacher"]["stop_grace_period"].removesuffix("s"))
    assert TeacherOptions(model="m").drain_seconds + 5 <= min(seconds, STOP_SECONDS)


@pytest.mark.parametrize("service", OURS)
def test_dockerfile_copies_what_exists_and_drops_root(service):
    text = (REPOSITORY / OURS[service]).read_text()
    assert SERVICES[service]["build"] == {"context": ".", "dockerfile": OURS[service]}
    for sources in re.findall(r"^COPY (.+) \S+$", text, flags=re.MULTILINE):
        for source in sources.split():
            assert (REPOSITORY / source).exists(), source
    assert re.search(r"^USER smoothkd$", text, flags=re.MULTILINE)
    (extras,) = re.findall(r'pip install --no-cache-dir "\.\[(.+)\]"', text)
    extras = extras.replace("${EXTRA}", "".join(re.findall(r"^ARG EXTRA=(.+)$", text, flags=re.MULTILINE)))
    assert set(extras.split(",")) <= set(_extras())


def _extras() -> dict[str, list[str]]:
    import tomllib

    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]


class Hosts:
    """What a container network gives: names to addresses. Here every name is this host, with a port of its own."""

    def __init__(self, folder: Path, postgres_url: str, model: Path) -> None:
        self.ports = {name: free_port() for name in ("redis", "api", "teacher", "dashboard")}
        self.folder = folder
        self.postgres_url = postgres_url
        self.model = model

    def environment(self, service: str) -> dict[str, str]:
        declared = {key: interpolate(str(value)) for key, value in SERVICES[service].get("environment", {}).items()}
        for key, value in declared.items():
            for host, port in {"redis": 6379, "api": 8440, "teacher": 8442}.items():
                declared[key] = re.sub(rf"\b{host}:{port}\b", f"127.0.0.1:{self.ports[host]}", declared[key])
            declared[key] = declared[key].replace("dns:///", "").replace("127.0.0.1:8442", self.address("teacher"))
            if value == "0.0.0.0":
                declared[key] = "127.0.0.1"
        declared["SMOOTHKD_DATA_DIR"] = str(self.folder / "data")
        if "SMOOTHKD_DATABASE_URL" in declared:
            assert declared["SMOOTHKD_DATABASE_URL"] == "postgresql+psycopg://smoothkd:smoothkd@postgres:5432/smoothkd"
            declared["SMOOTHKD_DATABASE_URL"] = self.postgres_url
        for name in ("api", "teacher", "dashboard"):
            declared[f"SMOOTHKD_{name.upper()}_PORT"] = str(self.ports[name])
        return {**os.environ, **declared, "OMP_NUM_THREADS": "1"}

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}"

    def command(self, service: str) -> list[str]:
        command = [interpolate(part) for part in SERVICES[service]["command"]]
        if service == "redis":
            return [str(valkey_binary()), *command[1:], "--port", str(self.ports["redis"]), "--dir", str(self.folder)]
        return SMOOTHKD + [str(self.model) if "SmolLM2" in part else part for part in command]


def interpolate(text: str) -> str:
    """Compose's ${NAME:-default} with nothing set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def hosts(tmp_path: Path, postgres_url: str, tiny_model: Path) -> Hosts:
    return Hosts(tmp_path, postgres_url, tiny_model)


@pytest.fixture
def containers(hosts: Hosts) -> Iterator[dict[str, subprocess.Popen]]:
    started: dict[str, subprocess.Popen] = {}
    try:
        for service in ("redis", "api", "teacher", "worker", "dashboard"):
            log = (hosts.folder / f"{service}.log").open("wb")
            with log:
                started[service] = subprocess.Popen(
                    hosts.command(service), env=hosts.environment(service), stdout=log, stderr=log, cwd=hosts.folder
                )
            if service == "redis":
                wait_until(lambda: connects(hosts.ports["redis"]), started["redis"], "redis", hosts.folder)
        yield started
    finally:
        for process in reversed(started.values()):
            process.terminate()
        for process in reversed(started.values()):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition, process, name, folder, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"{name} ended: {(folder / f'{name}.log').read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"{name} is not healthy: {(folder / f'{name}.log').read_text()[-2000:]}"
        time.sleep(0.2)


@pytest.mark.slow
def test_the_services_of_the_compose_file_become_healthy(hosts, containers):
    for service in OURS:
        test = SERVICES[service]["healthcheck"]["test"]
        assert test[:2] == ["CMD", "smoothkd"]
        check = SMOOTHKD + test[2:]

        def healthy(check=check, service=service) -> bool:
            return subprocess.run(check, env=hosts.environment(service), capture_output=True).returncode == 0

        wait_until(healthy, containers[service], service, hosts.folder)
    containers["teacher"].terminate()
    containers["teacher"].wait(20)
    check = SMOOTHKD + SERVICES["teacher"]["healthcheck"]["test"][2:]
    assert subprocess.run(check, env=hosts.environment("teacher"), capture_output=True).returncode == 1
