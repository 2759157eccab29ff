"""A connection to SQLite or PostgreSQL, migrated to the newest schema.

SQLite runs in WAL mode: readers never wait, writers take turns. A writing transaction begins with BEGIN
IMMEDIATE, because one that began as a reader could not wait its turn. On PostgreSQL writers lock the rows
they are about to change, always in the order sweep, stages, runs, change counter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, InterfaceError, OperationalError

from services.contract.errors import InvalidInputError, MissingExtraError, StoreUnavailableError

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 30
MIGRATION_LOCK = 0x736D6B64  # "smkd": any number will do that all processes agree on


class Database:
    """Reading and writing transactions on one database.

    ``url`` is a SQLAlchemy URL: sqlite:///path or postgresql://user@host/name. Raises InvalidInputError for
    any other, MissingExtraError without the PostgreSQL driver, StoreUnavailableError when the server does
    not answer.
    """

    def __init__(self, url: str) -> None:
        self._url = _checked_url(url)
        self._engine = _create_engine(self._url)
        self._reader = self._engine
        if self.is_postgresql:
            # Several queries of one reading transaction then see the same moment; in WAL mode SQLite's do too.
            self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ")
        self._writer = self._engine.execution_options(immediate=True)
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise

    @property
    def is_postgresql(self) -> bool:
        return self._url.get_backend_name() == "postgresql"

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads and sees one moment; StoreUnavailableError when the database is gone."""
        with self._available(), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that commits at the end of the block, or rolls back on an exception.

        Raises StoreUnavailableError when the database is gone.
        """
        with self._available(), self._writer.begin() as connection:
            yield connection

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            if not _means_unavailable(error):
                raise
            shown = self._url.render_as_string(hide_password=True)
            raise StoreUnavailableError(
                f"the database {shown} does not answer: {str(error.orig).strip()}",
                fix="Check that it runs and that SMOOTHKD_DATABASE_URL (or SMOOTHKD_DATA_DIR, for SQLite) names it.",
            ) from error

    def _migrate(self) -> None:
        scripts = ScriptDirectory.from_config(migration_config())
        with self.reading() as connection:
            revision = _revision(connection)
        if revision == scripts.get_current_head():
            return
        if revision is not None and revision not in {script.revision for script in scripts.walk_revisions()}:
            raise InvalidInputError(
                f"the database was written by a newer release of smoothkd (its schema is {revision})",
                fix="Install that release, or point SMOOTHKD_DATABASE_URL or SMOOTHKD_DATA_DIR elsewhere.",
            )
        with self.writing() as connection:
            if self.is_postgresql:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            # Looks at the revision again: another process may have migrated while this one waited its turn.
            command.upgrade(migration_config(connection), "head")


def migration_config(connection: Connection | None = None) -> Config:
    """Alembic's configuration for the migrations in this package, to run on ``connection``."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _revision(connection: Connection) -> str | None:
    """The newest migration that the database has seen."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _checked_url(url: str) -> URL:
    fix = "Write sqlite:////absolute/path.db or postgresql://user:password@host/database."
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise InvalidInputError(f"{url!r} is not a database URL", fix=fix) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise InvalidInputError(f"the store cannot live in a {parsed.drivername} database", fix=fix)
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise InvalidInputError("the store needs a file: several processes share it", fix=fix)
    return parsed


def _create_engine(url: URL) -> Engine:
    if url.get_backend_name() == "postgresql":
        try:
            return create_engine(url, pool_pre_ping=True, pool_size=5, max_overflow=15)
        except ModuleNotFoundError:
            raise MissingExtraError(
                "the PostgreSQL driver is not installed", fix="Run pip install 'smoothkd[postgres]'."
            ) from None
    assert url.database
    Path(url.database).absolute().parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own: _begin_sqlite does
    for pragma in (f"busy_timeout={BUSY_SECONDS * 1000}", "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _means_unavailable(error: DBAPIError) -> bool:
    # The bare DatabaseError is SQLite's for a file that is damaged or no database; other errors are its subclasses.
    return error.connection_invalidated or type(error) in (OperationalError, InterfaceError, DatabaseError)
