"""Freezing a guest: whatever its agent answers, it is thawed, and consistency is not claimed falsely."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

import pytest

from island_fast.errors import IslandError, NotFoundError, RefusedError
from island_fast.qemu.freeze import FREEZES, Clock, FreezeResult, run_while_frozen

STATUS, FREEZE, THAW = (f"guest-fsfreeze-{verb}" for verb in ("status", "freeze", "thaw"))
WELL: Mapping[str, list[object]] = {STATUS: ["thawed"], FREEZE: [2], THAW: [2]}
NO = IslandError("its agent did not answer")
REFUSED = RefusedError("its agent refused")


class Agent:
    """Answers each command with the next of its answers, or raises it; the last one stays."""

    who = "domain 'web1'"
    thaw_command = "virsh -c URI domfsthaw web1"

    def __init__(self, **others: list[object]) -> None:
        self.answers = {command: [*said] for command, said in WELL.items()}
        self.answers |= {f"guest-fsfreeze-{verb}": said for verb, said in others.items()}
        self.said: list[str] = []
        self.waits: list[float] = []
        self.time = 0.0
        self.renewals: list[Exception | None] = [None]

    def reconnect(self) -> None:
        self.said.append("renewed")
        said = self.renewals.pop(0) if len(self.renewals) > 1 else self.renewals[0]
        if said is not None:
            raise said

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds

    def ask_agent(self, command: str, timeout: int) -> object:
        assert 0 < timeout <= 60
        self.said.append(command)
        answers = self.answers[command]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def take(self, freeze: str) -> FreezeResult:
        clock = Clock(lambda: self.time, self.sleep)
        return run_while_frozen(self, freeze, lambda: self.said.append("pins"), clock)


@pytest.mark.parametrize("freeze", ["auto", "require"])
def test_pins_are_taken_between_freeze_and_thaw(freeze: str) -> None:
    agent = Agent()
    assert agent.take(freeze) == FreezeResult("filesystem", "the guest's file systems were frozen")
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
        ({"freeze": [REFUSED], "thaw": [0]}, [STATUS, FREEZE]),
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


def test_a_thaw_is_tried_again_through_a_new_connection() -> None:
    agent = Agent(thaw=[NO, REFUSED, NO, 2])
    agent.renewals = [IslandError("libvirt cannot be reached"), None]
    assert agent.take("auto").consistency == "filesystem"
    assert agent.said == [STATUS, FREEZE, "pins", THAW, *["renewed", THAW] * 3]
    assert agent.waits == [0.5, 1, 2]


def test_a_freeze_without_an_answer_is_thawed_until_that_is_done() -> None:
    agent = Agent(freeze=[NO], thaw=[*[NO] * 20, 1])
    assert agent.take("auto") == FreezeResult("crash", "its agent did not answer")
    assert agent.said == [STATUS, FREEZE, THAW, *["renewed", THAW] * 20, "pins"]


@pytest.mark.parametrize("freeze", [[2], [NO]])
def test_a_guest_that_stays_frozen_is_told(caplog: pytest.LogCaptureFixture, freeze: list[object]) -> None:
    agent = Agent(freeze=freeze, thaw=[NO])
    with caplog.at_level(logging.WARNING, "island_fast"):
        moment = agent.take("auto")
    assert moment.consistency == "crash"
    (record,) = caplog.records
    assert (
        moment.stuck
        == record.getMessage()
        == (
            "domain 'web1' may still be frozen (its agent did not answer); run "
            "'virsh -c URI domfsthaw web1', or restart its agent"
        )
    )
    assert agent.said.count("pins") == 1
    assert 290 < sum(agent.waits) <= 300
    assert max(agent.waits) == 5


@pytest.mark.parametrize("gone", [NotFoundError("there is none"), RefusedError("it is not running")])
def test_a_guest_that_ended_is_not_thawed_any_more(gone: IslandError) -> None:
    agent = Agent(thaw=[NO])
    agent.renewals = [gone]
    moment = agent.take("auto")
    assert (moment.consistency, moment.stuck) == ("crash", "")
    assert moment.reason.startswith("it ended while it was frozen: ")
    assert agent.said == [STATUS, FREEZE, "pins", THAW, "renewed"]


@pytest.mark.parametrize("freeze", FREEZES)
def test_pins_that_fail_leave_a_guest_that_goes_on(freeze: str) -> None:
    agent = Agent()

    def fail() -> None:
        raise IslandError("no space")

    with pytest.raises(IslandError, match="no space"):
        run_while_frozen(agent, freeze, fail)
    assert agent.said == ([] if freeze == "never" else [STATUS, FREEZE, THAW])


def test_no_signal_comes_between_them() -> None:
    """Python's signal handlers run in the main thread, and what they raise is raised there."""
    where = []
    agent = Agent()
    run_while_frozen(agent, "auto", lambda: where.append(threading.current_thread()))
    assert where != [threading.main_thread()]
