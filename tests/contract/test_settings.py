"""Settings as other parts rely on them."""

from services.contract.settings import Settings


def test_equal_settings_remember_the_same() -> None:
    remembered = {Settings(teacher_addresses={"a": "b:1"}, teacher_token="secret"): "loaded"}
    assert remembered[Settings(teacher_addresses={"a": "b:1"}, teacher_token="secret")] == "loaded"
    assert Settings(teacher_addresses={"a": "c:1"}, teacher_token="secret") not in remembered
    assert Settings(teacher_addresses={"a": "b:1"}, teacher_token="other") not in remembered
