"""The connection to libvirt: it may die, be on another host, and answer anything."""

from __future__ import annotations

import pytest

from island_fast.errors import IslandError, NotFoundError
from island_fast.qemu.libvirt import Domain
from tests.guests.session import Guest
from tests.guests.test_domains import image


def test_a_connection_is_renewed_or_kept(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    with Domain(guest.name, guest.libvirt.uri) as domain:
        first = domain._connection
        domain.reconnect()
        assert domain._connection is not first
        node = domain.find_node(image(guest, "a"))
        for name, value, error in (
            ("_connect", "qemu:///session?socket=/no", IslandError),
            ("name", "x", NotFoundError),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(domain, name, value)
                with pytest.raises(error):
                    domain.reconnect()
            assert domain.find_node(image(guest, "a")) == node


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_this_host_has_several_names(guest: Guest, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    import libvirt as module

    monkeypatch.setattr(module.virConnect, "getURI", lambda _: f"qemu+tcp://{host}/system")
    with Domain(guest.name, guest.libvirt.uri) as domain:
        assert [disk.name for disk in domain.find_disks()] == ["vda", "vdb"]


@pytest.mark.parametrize("asked", ["getURI", "getType"])
def test_a_connection_that_dies_at_once_is_told(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    import libvirt as module

    def dead(_: object) -> str:
        raise module.libvirtError("client socket is closed")

    monkeypatch.setattr(module.virConnect, asked, dead)
    with pytest.raises(IslandError, match=r"report host and kind for domain .* \(client socket is closed\)"):
        Domain(guest.name, guest.libvirt.uri)


@pytest.mark.parametrize("answer", ["[" * 100_000, "<domain>", "no"])
def test_answers_without_sense_are_told(guest: Guest, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    import libvirt as module
    import libvirt_qemu

    with Domain(guest.name, guest.libvirt.uri) as domain:
        monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", lambda *_: answer)
        monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", lambda *_: answer)
        monkeypatch.setattr(module.virDomain, "XMLDesc", lambda *_: answer)
        with pytest.raises(IslandError, match=r"pass on query-status for .* \(its answer is invalid\)"):
            domain.command("query-status")
        with pytest.raises(IslandError, match=r"list the disks for .* \(its answer is invalid\)"):
            domain.find_disks()
        with pytest.raises(IslandError, match="its agent did not answer guest-ping "):
            domain.ask_agent("guest-ping", 1)
