"""A store on SQLite and one on PostgreSQL, each with a database of the test's own, and a queue's server."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from services.store.store import Store
from tests.store.redis_server import RedisServer


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
        return
    yield from _fresh_postgresql(request.getfixturevalue("careless_postgres_url"))


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = Store(database_url)
    yield store
    store.close()


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'store.db'}")
    yield store
    store.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A queue's server of the test's own, to be killed and started again."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def careless_postgres_url(postgres_url: str) -> str:
    """The server without its care for power cuts: databases then come and go several times faster."""
    with psycopg.connect(_address(postgres_url), autocommit=True) as admin:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            admin.execute(f"ALTER SYSTEM SET {setting} = off")
        admin.execute("SELECT pg_reload_conf()")
    return postgres_url


def _fresh_postgresql(server_url: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(_address(server_url), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        yield server_url.replace("/postgres?", f"/{name}?")
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _address(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://")
