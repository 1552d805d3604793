"""The VDUSE kind of device on a kernel that has it, Debian 13's, in a virtual machine: `make attached`.

The machine is emulated and slow, so it starts once and runs every case; the tests look at what it said.
"""

from __future__ import annotations

import json

import pytest

from tests.live import machine
from tests.live.guest import MARK
from tests.live.vduse_kills import MARK as ROUND

pytestmark = pytest.mark.attached

CASES = [
    "vduse_cases::it_is_right_and_is_chosen nobody",
    "vduse_cases::it_has_queues_a_serial_and_no_partitions",
    "test_attach::test_a_volume_that_a_guest_has_open_is_not_detached",
    "vduse_cases::a_mounted_file_system_is_not_detached_and_outlives_growth",
    "vduse_cases::what_stands_on_it_without_a_process_keeps_it",
    "vduse_cases::a_volume_that_is_written_to_is_frozen_grows_and_gets_a_new_daemon",
    "vduse_cases::what_was_not_flushed_when_the_daemon_died_is_not_confirmed",
    "vduse_cases::requests_that_a_dead_daemon_took_with_it_fail",
    "vduse_cases::a_disk_whose_daemon_and_watcher_are_killed_gets_errors_by_care",
    "vduse_cases::a_dead_disk_that_a_guest_has_open_gives_way_to_a_new_one",
    "vduse_cases::a_daemon_that_is_asked_to_end_leaves_errors_and_no_hang",
    "vduse_cases::what_a_crash_of_the_service_leaves_is_used_or_removed",
    "vduse_cases::another_driver_that_took_the_device_gives_it_back",
    "vduse_cases::another_program_s_device_is_left_alone",
    "vduse_cases::the_host_s_udev_leaves_it_alone",
]
KILLS = "vduse_kills::rounds_of_kills nobody"


def run_in_machine(cases: list[str], patience: float, **environment: str) -> str:
    """Run cases in the machine; return all that its console saw."""
    if reason := machine.missing(machine.VDUSE_GUEST):
        pytest.fail(reason)  # it was asked for
    job = machine.python_job("tests.live.guest", cases, {"ISLAND_LIVE_KIND": "vduse", **environment})
    return machine.run(job, patience, machine.VDUSE_GUEST)


def failures(said: str) -> dict[str, str]:
    lines = [line.removeprefix(MARK) for line in said.splitlines() if line.startswith(MARK)]
    return {answer["test"]: answer["failed"] for answer in map(json.loads, lines)}


@pytest.fixture(scope="module")
def said() -> str:
    console = run_in_machine(CASES, 3500)
    (machine.VDUSE_GUEST / "console").write_text(console)
    return console


@pytest.mark.timeout(3600)  # for the first of them, which starts the machine
@pytest.mark.parametrize("case", CASES)
def test_on_a_kernel_with_vduse(said: str, case: str) -> None:
    found = failures(said)
    assert case in found, f"the machine did not get so far: {said[-4000:]}"
    assert not found[case], found[case]


@pytest.mark.timeout(0)
def test_kills_while_a_user_writes(request: pytest.FixtureRequest) -> None:
    rounds = request.config.getoption("--rounds")
    console = run_in_machine([KILLS], 300.0 + 180.0 * rounds, ISLAND_ROUNDS=str(rounds))
    (machine.VDUSE_GUEST / "console-kills").write_text(console)
    found = failures(console)
    assert KILLS in found, f"the machine did not get so far: {console[-4000:]}"
    assert not found[KILLS], found[KILLS]
    assert console.count(ROUND) == rounds
