"""The ways to sign in to a real Swift, and what is said when they fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from island_fast.errors import StoreError
from island_fast.stores.open import open_store
from island_fast.stores.retry import RetryPolicy
from island_fast.stores.swift import SwiftStore
from island_fast.stores.swift_auth import SwiftAuth, Token, auth_from_environment
from tests.support.keystone_server import CREDENTIAL, PASSWORD, SECRET, KeystoneServer
from tests.support.swift_server import SwiftServer

BRIEF = RetryPolicy(total=0.3, first=0.02, longest=0.1)


@pytest.fixture
def container(swift: SwiftServer) -> str:
    swift.create_container("signed-in")
    return "swift://signed-in/x"


@pytest.fixture
def keystone(swift: SwiftServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeystoneServer]:
    """A Keystone, and its credentials in the environment instead of Swift's own."""
    for key in swift.environment():
        monkeypatch.delenv(key)
    with KeystoneServer(swift) as server:
        for key, value in server.environment().items():
            monkeypatch.setenv(key, value)
        yield server


def works(url: str) -> SwiftAuth:
    """Put, get and delete through the store at `url`; return its `SwiftAuth`."""
    with open_store(url) as store:
        name = f"object-{os.urandom(4).hex()}"
        store.put(name, [b"x"])
        assert store.get(name) == b"x"
        store.delete(name)
        return store._pool._auth  # type: ignore[attr-defined,no-any-return]


def test_tempauth(container: str):
    assert works(container).source == "ST_AUTH, ST_USER and ST_KEY"


def test_a_token_and_its_url(swift: SwiftServer, container: str, monkeypatch: pytest.MonkeyPatch):
    url, token = swift.sign_in()
    for key in swift.environment():
        monkeypatch.delenv(key)
    monkeypatch.setenv("OS_STORAGE_URL", url)
    monkeypatch.setenv("OS_AUTH_TOKEN", token)
    auth = works(container)
    swift.revoke_tokens()
    with pytest.raises(StoreError, match="OS_STORAGE_URL and OS_AUTH_TOKEN; correct or renew them") as caught:
        open_store(container)
    assert token not in str(caught.value) + repr(auth) + repr(auth.get_token())


def test_keystone_by_password(container: str, keystone: KeystoneServer):
    works(container)
    (asked,) = keystone.asked
    assert asked["auth"]["scope"]["project"] == {"name": "test", "domain": {"id": "default"}}
    assert asked["auth"]["identity"]["password"]["user"]["domain"] == {"name": "Default"}


def test_keystone_by_the_names_of_old_openrc_files(
    container: str, keystone: KeystoneServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OS_TENANT_NAME", "test")
    monkeypatch.delenv("OS_PROJECT_NAME")
    monkeypatch.setenv("OS_ENDPOINT_TYPE", "publicURL")
    monkeypatch.setenv("OS_AUTH_URL", keystone.url + "/v3/")
    works(container)
    assert keystone.asked[0]["auth"]["scope"]["project"]["name"] == "test"


def test_keystone_by_application_credential(
    container: str, keystone: KeystoneServer, monkeypatch: pytest.MonkeyPatch
):
    for key in keystone.environment():
        if key not in ("OS_AUTH_URL", "OS_REGION_NAME"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("OS_APPLICATION_CREDENTIAL_ID", CREDENTIAL)
    monkeypatch.setenv("OS_APPLICATION_CREDENTIAL_SECRET", SECRET)
    works(container)
    assert keystone.asked[0]["auth"]["identity"]["methods"] == ["application_credential"]


def test_keystone_renews_an_expired_token(swift: SwiftServer, container: str, keystone: KeystoneServer):
    with open_store(container) as store:
        store.put("renewed", [b"x"])
        swift.revoke_tokens()
        assert store.get("renewed") == b"x"
        store.delete("renewed")
    assert keystone.issued == 2


def test_another_url_than_the_catalogues(
    swift: SwiftServer, container: str, keystone: KeystoneServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OS_REGION_NAME", "one")
    monkeypatch.setenv("OS_STORAGE_URL", swift.sign_in()[0] + "/")
    works(container)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")  # its own
def test_clouds_yaml(
    container: str, keystone: KeystoneServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    pytest.importorskip("openstack", reason="openstacksdk is not installed")
    auth = {
        "auth_url": keystone.url,
        "username": "tester",
        "password": PASSWORD,
        "project_name": "test",
        "user_domain_name": "Default",
        "project_domain_name": "Default",
    }
    clouds = {"clouds": {"home": {"auth": auth, "region_name": "two"}}}
    (tmp_path / "clouds.yaml").write_text(json.dumps(clouds))  # JSON is YAML
    for key in keystone.environment():
        monkeypatch.delenv(key)
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
    monkeypatch.setenv("OS_CLOUD", "home")
    assert works(container).source == "OS_CLOUD home"
    monkeypatch.setenv("OS_CLOUD", "elsewhere")
    with pytest.raises(StoreError, match=r"OS_CLOUD elsewhere .*clouds\.yaml"):
        open_store(container)


def test_clouds_yaml_without_openstacksdk(container: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ST_AUTH")
    monkeypatch.setenv("OS_CLOUD", "home")
    monkeypatch.setitem(sys.modules, "openstack.config", None)
    with pytest.raises(StoreError, match=r"run 'pip install openstacksdk'"):
        open_store(container)


# -- what is said when it fails


def test_no_credentials_at_all(container: str, swift: SwiftServer, monkeypatch: pytest.MonkeyPatch):
    for key in swift.environment():
        monkeypatch.delenv(key)
    with pytest.raises(StoreError, match=r"no credentials.*ST_AUTH.*OS_CLOUD.*OS_AUTH_URL.*OS_PROJECT_NAME"):
        open_store(container)


def test_a_part_of_the_credentials(container: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ST_KEY")
    with pytest.raises(StoreError, match="ST_AUTH is set without ST_KEY"):
        open_store(container)
    monkeypatch.setenv("ST_AUTH", "")
    monkeypatch.setenv("OS_AUTH_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("OS_AUTH_TYPE", "v3applicationcredential")
    monkeypatch.setenv("OS_APPLICATION_CREDENTIAL_ID", "id")
    with pytest.raises(
        StoreError, match=r"v3applicationcredential .*secret.*OS_APPLICATION_CREDENTIAL_ID and _SECRET"
    ):
        open_store(container)
    monkeypatch.setenv("OS_AUTH_TYPE", "none-such")
    with pytest.raises(StoreError, match="OS_AUTH_TYPE none-such cannot be used"):
        open_store(container)


def test_a_wrong_password_is_told_at_once(
    swift: SwiftServer, container: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ST_KEY", "guess-it")
    swift.calm()
    with pytest.raises(StoreError, match="ST_AUTH, ST_USER and ST_KEY; correct") as caught:
        open_store(container)
    assert "guess-it" not in str(caught.value)
    assert swift.count("GET", "/auth/") == 1


def test_a_wrong_password_for_keystone(
    container: str, keystone: KeystoneServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OS_PASSWORD", "guess-it")
    with pytest.raises(StoreError, match="OS_AUTH_URL and the OS_ variables") as caught:
        open_store(container)
    assert "guess-it" not in str(caught.value)
    assert len(keystone.asked) == 1


def test_a_catalogue_without_an_object_store(
    container: str, keystone: KeystoneServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OS_REGION_NAME", "three")
    with pytest.raises(StoreError, match="no object-store in region three"):
        open_store(container)


@pytest.mark.swift_only("there it may read every container of its account")
def test_a_user_who_may_only_look_on(container: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ST_USER", "test:reader")
    monkeypatch.setenv("ST_KEY", "reading")
    with pytest.raises(StoreError, match=r"403 Forbidden.*role"):
        open_store(container)


@pytest.mark.parametrize("auth", ["http://127.0.0.1:9/auth/v1.0", "http://user:hidden@127.0.0.1:9/auth"])
def test_a_server_that_is_not_there(container: str, monkeypatch: pytest.MonkeyPatch, auth: str):
    monkeypatch.setenv("ST_AUTH", auth)
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        SwiftStore.open("signed-in/x", BRIEF)
    assert time.monotonic() - began < 10
    assert str(caught.value) == (
        "cannot reach Swift at 127.0.0.1:9 (Connection refused at the sign-in with ST_AUTH, ST_USER and "
        "ST_KEY, tried for 0 s); nothing was changed"
    )


def test_a_keystone_that_is_not_there_is_quiet_too(container: str, keystone: KeystoneServer):
    code = (
        "from island_fast.stores.swift import SwiftStore; from island_fast.stores.retry import RetryPolicy\n"
        "try: SwiftStore.open('signed-in/x', RetryPolicy(0.3, 0.02, 0.1))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environ = {**os.environ, "OS_AUTH_URL": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.stderr == ""
    assert "StoreError cannot reach Swift at 127.0.0.1:9 (" in done.stdout
    assert PASSWORD not in done.stdout


@pytest.mark.parametrize("auth", ["nonsense", "ftp://127.0.0.1/auth", "http://"])
def test_an_address_that_is_none(container: str, monkeypatch: pytest.MonkeyPatch, auth: str):
    monkeypatch.setenv("ST_AUTH", auth)
    with pytest.raises(StoreError, match="ST_AUTH, ST_USER and ST_KEY"):
        SwiftStore.open("signed-in/x", BRIEF)


def test_the_environments_proxy_and_certificates(
    swift: SwiftServer, monkeypatch: pytest.MonkeyPatch, tmp_path
):
    """Read once, when a connection is made; requests itself is told to look at neither."""
    swift.create_container("proxied")
    monkeypatch.setenv("OS_CACERT", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with SwiftStore.open("proxied", BRIEF) as store:
        (connection,) = store._pool._idle
        http = connection.http_conn[1]
        assert http.requests_args["verify"] == str(tmp_path)
        assert http.request_session.trust_env is False
        connection.close()
        connection.url = "http://swift.example/v1"
        monkeypatch.setenv("no_proxy", "")
        with pytest.raises(StoreError, match=r"put one: .*refused"):
            store.put("one", [b"x"])


def test_what_people_see_of_secrets(swift: SwiftServer):
    auth = auth_from_environment()
    token = auth.get_token()
    assert token.value not in repr(token) + repr(auth)
    assert token == Token(token.url, token.value)
    assert swift.key not in repr(auth)


def test_variables_with_something_before_their_names(
    container: str, keystone: KeystoneServer, monkeypatch: pytest.MonkeyPatch
):
    """Then the usual ones count for nothing, whichever way they would be."""
    for key, value in keystone.environment().items():
        monkeypatch.setenv(f"ISLAND_TO_{key}", value)
        monkeypatch.delenv(key)
    monkeypatch.setenv("ST_AUTH", "http://127.0.0.1:9/auth")
    with open_store(container, variables="ISLAND_TO_") as store:
        store.put("prefixed", [b"x"])
        store.delete("prefixed")
    assert keystone.issued == 1
    monkeypatch.setenv("ISLAND_TO_OS_REGION_NAME", "nowhere")
    with pytest.raises(StoreError, match="in region nowhere; set ISLAND_TO_OS_REGION_NAME"):
        open_store(container, variables="ISLAND_TO_")
    monkeypatch.delenv("ISLAND_TO_OS_AUTH_URL")
    with pytest.raises(StoreError, match="set ISLAND_TO_ST_AUTH, ISLAND_TO_ST_USER and ISLAND_TO_ST_KEY, or"):
        open_store(container, variables="ISLAND_TO_")
