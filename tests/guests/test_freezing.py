"""Guests that are frozen while their pins are taken: libvirt and channel are real, the agent is a test's."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from island_fast.qemu import freeze as freeze_module
from tests.cli.conftest import Island
from tests.guests import agent as agents
from tests.guests.agent import Agent
from tests.guests.session import Guest, Libvirt, pins
from tests.guests.test_domains import manifest

STATUS, FREEZE, THAW = (f"guest-fsfreeze-{verb}" for verb in ("status", "freeze", "thaw"))


@pytest.fixture(scope="module")
def booted(libvirt: Libvirt) -> Iterator[tuple[Guest, Agent]]:
    if reason := agents.missing():
        pytest.skip(reason)
    guest, agent = agents.boot(libvirt, "frozen", libvirt.image("frozen"))
    yield guest, agent
    agent.stop()
    guest.stop()


@pytest.fixture
def agent(booted: tuple[Guest, Agent]) -> Agent:
    """The guest's agent, which does all that it is asked for."""
    agent = booted[1]
    agent.said.clear()
    agent.answers = {STATUS: "thawed", FREEZE: 1, THAW: 1}
    return agent


@pytest.fixture
def words(booted: tuple[Guest, Agent]) -> tuple[object, ...]:
    guest = booted[0]
    return ("snapshot", "--domain", guest.name, "--connect", guest.libvirt.uri)


def held(guest: tuple[Guest, Agent]) -> list[str]:
    return pins(guest[0].libvirt.images / "frozen.qcow2")


def listed(island: Island) -> list[object]:
    found: list[object] = json.loads(island("list", "--json").out)
    return found


def test_the_pin_is_taken_while_the_guest_is_frozen(
    island: Island, booted: tuple[Guest, Agent], agent: Agent, words: tuple[object, ...]
) -> None:
    seen = []

    times = []

    def look() -> int:
        seen.append(held(booted))
        times.append(time.time_ns())
        return 1

    agent.answers |= {FREEZE: look, THAW: look}
    for freeze in ([], ["--freeze", "require"]):
        taken = island.json(*words, *freeze)
        assert (taken["consistency"], agent.said) == ("filesystem", [STATUS, FREEZE, THAW])
        (one,) = taken["snapshots"]
        assert times[-2] < manifest(island, one["snapshot"]).created < times[-1]
        before, during = seen
        (new,) = set(during) - set(before)
        assert new.endswith(one["snapshot"])
        assert manifest(island, one["snapshot"]).properties["consistency"] == "filesystem"
        seen.clear()
        agent.said.clear()
    assert island.json(*words, "--freeze", "never")["consistency"] == "crash"
    assert agent.said == []


@pytest.mark.parametrize(
    "answer, said",
    [
        (Exception("Command guest-fsfreeze-freeze has been disabled"), [STATUS, FREEZE]),
        (None, [STATUS, FREEZE, THAW]),
        (0, [STATUS, FREEZE, THAW]),
    ],
)
def test_a_freeze_that_fails(
    island: Island, booted: tuple[Guest, Agent], agent: Agent, words: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch, answer: object, said: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(freeze_module, "_FREEZE", 1)
    agent.answers[FREEZE] = answer
    before = held(booted)
    sentence = island.fails(4, *words, "--freeze", "require")
    assert sentence.startswith("domain 'frozen' was not frozen: its agent ")
    assert agent.said == said * 2
    assert held(booted) == before
    assert listed(island) == []
    agent.said.clear()
    taken = island.json(*words)
    assert (taken["consistency"], agent.said) == ("crash", said)
    assert taken["reason"] in sentence


def test_a_guest_that_may_still_be_frozen_is_stored_and_told(
    island: Island, booted: tuple[Guest, Agent], agent: Agent, words: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(freeze_module, "_PATIENCE", 1)
    agent.answers[THAW] = Exception("no")
    done = island(*words, "--json")
    assert done.code == 1
    (one,) = json.loads(done.out)["snapshots"]
    assert held(booted)[-1].endswith(one["snapshot"])
    guest = booted[0]
    by_hand = f"virsh -c '{guest.libvirt.uri}' domfsthaw {guest.name}"
    assert f"may still be frozen (its agent refused {THAW} (" in done.err.splitlines()[-1]
    assert by_hand in done.err
    assert agent.said == [STATUS, FREEZE, THAW, THAW]


def test_a_thaw_that_finds_nothing_frozen_takes_the_pin_back(
    island: Island, booted: tuple[Guest, Agent], agent: Agent, words: tuple[object, ...]
) -> None:
    agent.answers[THAW] = 0
    before = held(booted)
    assert "thawed by something else" in island.fails(4, *words, "--freeze", "require")
    assert (held(booted), listed(island)) == (before, [])


def test_a_signal_while_the_guest_is_frozen(
    island: Island, booted: tuple[Guest, Agent], agent: Agent, words: tuple[object, ...]
) -> None:
    running: list[subprocess.Popen[bytes]] = []

    def interrupt() -> int:
        running[0].send_signal(signal.SIGTERM)
        return 1

    agent.answers[FREEZE] = interrupt
    before = held(booted)
    running.append(island.start(*words, "--json"))
    output, _ = running[0].communicate(timeout=60)
    assert json.loads(output)["error"] == "interrupted"
    assert agent.said == [STATUS, FREEZE, THAW]
    assert held(booted) == before
    assert listed(island) == []
