"""Settings as other parts rely on them."""

import pytest

from services.contract.errors import InvalidInputError
from services.contract.settings import Settings, load_settings


def test_equal_settings_remember_the_same() -> None:
    remembered = {Settings(teacher_addresses={"a": "b:1"}, teacher_token="secret"): "loaded"}
    assert remembered[Settings(teacher_addresses={"a": "b:1"}, teacher_token="secret")] == "loaded"
    assert Settings(teacher_addresses={"a": "c:1"}, teacher_token="secret") not in remembered
    assert Settings(teacher_addresses={"a": "b:1"}, teacher_token="other") not in remembered


@pytest.mark.parametrize("name", ["teacher_token", "api_key", "judge_key", "model_server_key"])
def test_keys_lose_the_line_break_of_the_file_they_come_from(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SMOOTHKD_{name.upper()}", " a b\r\n")
    assert getattr(load_settings(), name).get_secret_value() == "a b"
    monkeypatch.setenv(f"SMOOTHKD_{name.upper()}", " \n")
    assert getattr(load_settings(), name) is None


@pytest.mark.parametrize("key", ["geh\u00e9im", "line\nbreak", "nul\x01"])
def test_keys_that_no_header_can_carry_are_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTHKD_TEACHER_TOKEN", key)
    with pytest.raises(InvalidInputError, match=r"SMOOTHKD_TEACHER_TOKEN: .*printable ASCII") as caught:
        load_settings()
    assert key not in str(caught.value)


@pytest.mark.parametrize("gib", ["inf", "nan", "-1"])
def test_a_cache_without_bounds_is_refused(gib: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTHKD_LABEL_CACHE_GIB", gib)
    with pytest.raises(InvalidInputError, match="SMOOTHKD_LABEL_CACHE_GIB: "):
        load_settings()
