"""Opening a database: migrations, pragmas, and addresses that cannot work."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from services.contract.errors import InvalidInputError, StoreUnavailableError
from services.store.database import Database, migration_config
from services.store.schema import metadata


def test_the_migrations_make_the_tables_of_the_schema(database_url: str) -> None:
    database = Database(database_url)
    with database.writing() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    database.close()


def test_the_migrations_can_be_undone_and_done_again(database_url: str) -> None:
    database = Database(database_url)
    with database.writing() as connection:
        command.downgrade(migration_config(connection), "base")
    with database.writing() as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
        command.upgrade(migration_config(connection), "head")
    with database.reading() as connection:
        assert connection.execute(text("SELECT counter FROM changes")).scalars().all() == [0]
    database.close()


def test_processes_that_open_a_new_database_together_all_succeed(database_url: str) -> None:
    code = "import sys; from services.store.store import Store; s = Store(sys.argv[1]); print(s.change_counter())"
    opening = [
        subprocess.Popen([sys.executable, "-c", code, database_url], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    for process in opening:
        output, errors = process.communicate(timeout=60)
        assert (output.strip(), errors) == (b"0", b"")


def test_sqlite_is_in_wal_mode_with_foreign_keys(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'new' / 'folder' / 'store.db'}")
    with database.reading() as connection:
        found = {name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")}
        assert found == {"journal_mode": "wal", "synchronous": 1}
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 30_000
    database.close()


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("mysql://user@host/db", "cannot live in a mysql database"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("not a url", "is not a database URL"),
        ("postgresql://host:port/db", "is not a database URL"),
    ],
)
def test_an_address_of_another_kind_is_refused(url: str, complaint: str) -> None:
    with pytest.raises(InvalidInputError, match=complaint):
        Database(url)


def test_an_absent_server_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        Database(f"postgresql://user:secret@/db?host={tmp_path}")
    assert "postgresql+psycopg://user:***@/db" in caught.value.what
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_text("these are not the pages of a database " * 100)
    with pytest.raises(StoreUnavailableError, match="file is not a database"):
        Database(f"sqlite:///{path}")


def test_a_database_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    Database(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(InvalidInputError, match="newer release"):
        Database(f"sqlite:///{path}")


def test_a_failed_transaction_leaves_nothing(database_url: str) -> None:
    database = Database(database_url)

    def fail_halfway() -> None:
        with database.writing() as connection:
            connection.execute(text("UPDATE changes SET counter = 7"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    with database.reading() as connection:
        assert connection.execute(text("SELECT counter FROM changes")).scalar() == 0
    database.close()
