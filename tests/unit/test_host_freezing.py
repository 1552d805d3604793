"""Freezing a guest: whatever its agent answers, it is thawed, and consistency is not claimed falsely."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

import pytest

from island_fast.errors import IslandError, RefusedError
from island_fast.host.freezing import FREEZES, Moment, at_one_moment

STATUS, FREEZE, THAW = (f"guest-fsfreeze-{verb}" for verb in ("status", "freeze", "thaw"))
WELL: Mapping[str, list[object]] = {STATUS: ["thawed"], FREEZE: [2], THAW: [2]}
NO = IslandError("its agent did not answer")


class Agent:
    """Answers each command with the next of its answers, or raises it; the last one stays."""

    name = "web1"
    who = "domain 'web1'"

    def __init__(self, **others: list[object]) -> None:
        self.answers = {command: [*said] for command, said in WELL.items()}
        self.answers |= {f"guest-fsfreeze-{verb}": said for verb, said in others.items()}
        self.said: list[str] = []

    def agent(self, command: str, timeout: int) -> object:
        assert 0 < timeout <= 60
        self.said.append(command)
        answers = self.answers[command]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def take(self, freeze: str) -> Moment:
        return at_one_moment(self, freeze, lambda: self.said.append("pins"))


@pytest.mark.parametrize("freeze", ["auto", "require"])
def test_pins_are_taken_between_freeze_and_thaw(freeze: str) -> None:
    agent = Agent()
    assert agent.take(freeze) == Moment("filesystem", "the guest's file systems were frozen")
    assert agent.said == [STATUS, FREEZE, "pins", THAW]


def test_never_asks_nothing() -> None:
    agent = Agent()
    assert agent.take("never").consistency == "crash"
    assert agent.said == ["pins"]


@pytest.mark.parametrize(
    "others, said",
    [
        ({"status": [NO]}, [STATUS]),
        ({"status": ["frozen"]}, [STATUS]),
        ({"status": [{"hostile": True}]}, [STATUS]),
        ({"freeze": [NO]}, [STATUS, FREEZE, THAW]),
        ({"freeze": [0], "thaw": [0]}, [STATUS, FREEZE, THAW]),
        ({"freeze": ["many"]}, [STATUS, FREEZE, THAW]),
        ({"freeze": [None]}, [STATUS, FREEZE, THAW]),
    ],
)
def test_a_guest_that_cannot_be_frozen_is_thawed_before_its_pins(
    others: dict[str, list[object]], said: list[str]
) -> None:
    agent = Agent(**others)
    moment = agent.take("auto")
    assert moment.consistency == "crash"
    assert moment.reason
    assert agent.said == [*said, "pins"]
    agent = Agent(**others)
    with pytest.raises(RefusedError, match="domain 'web1' was not frozen: ") as caught:
        agent.take("require")
    assert moment.reason in str(caught.value)
    assert agent.said == said, "and nothing was taken"


@pytest.mark.parametrize("thaw", [[0], [NO], ["two"]])
def test_a_freeze_that_may_have_ended_early_is_none(thaw: list[object]) -> None:
    agent = Agent(thaw=[*thaw])
    assert agent.take("auto").consistency == "crash"
    assert agent.said.count("pins") == 1
    with pytest.raises(RefusedError):
        Agent(thaw=[*thaw]).take("require")


def test_a_thaw_is_tried_again() -> None:
    agent = Agent(thaw=[NO, NO, 2])
    assert agent.take("auto").consistency == "filesystem"
    assert agent.said == [STATUS, FREEZE, "pins", THAW, THAW, THAW]


def test_a_guest_that_stays_frozen_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "island_fast"):
        Agent(thaw=[NO]).take("auto")
    (record,) = caplog.records
    assert record.getMessage() == (
        "domain 'web1' may still be frozen (its agent did not answer); run 'virsh domfsthaw web1', "
        "or restart its agent"
    )


@pytest.mark.parametrize("freeze", FREEZES)
def test_pins_that_fail_leave_a_guest_that_goes_on(freeze: str) -> None:
    agent = Agent()

    def fail() -> None:
        raise IslandError("no space")

    with pytest.raises(IslandError, match="no space"):
        at_one_moment(agent, freeze, fail)
    assert agent.said == ([] if freeze == "never" else [STATUS, FREEZE, THAW])


def test_no_signal_comes_between_them() -> None:
    """Python's signal handlers run in the main thread, and what they raise is raised there."""
    where = []
    agent = Agent()
    at_one_moment(agent, "auto", lambda: where.append(threading.current_thread()))
    assert where != [threading.main_thread()]
