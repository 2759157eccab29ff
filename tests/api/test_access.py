"""Who gets in: keys, hosts, origins."""

import pytest

from services.api.access import is_loopback, require_safe_binding
from services.contract.errors import AuthenticationError
from services.contract.settings import Settings


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost", "LOCALHOST", "localhost."])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "127.0.0.1.evil.io", "evil-localhost"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("key", [None, ""])
def test_other_machines_need_a_key(key: str | None) -> None:
    with pytest.raises(AuthenticationError, match=r"0\.0\.0\.0.*without a key") as caught:
        require_safe_binding(Settings(api_host="0.0.0.0", api_key=key))
    assert "SMOOTHKD_API_KEY" in caught.value.fix
    assert caught.value.exit_code == 2
    require_safe_binding(Settings(api_host="0.0.0.0", api_key="k"))
    require_safe_binding(Settings(api_host="127.0.0.1", api_key=key))
