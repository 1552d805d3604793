"""Run by test_interface.py in a process of its own: the driver's answers that need no service and no store.

Prints one line for each that is not right.
"""

import logging
from unittest import mock

from cinder import objects

objects.register_all()

from island_fast.driver import IslandDriver  # noqa: E402


def driver(**options):
    made = IslandDriver.__new__(IslandDriver)
    made.configuration = mock.Mock(safe_get=options.get, config_group="island")
    made._volumes = mock.Mock()
    return made


def check_backup_use_temp_snapshot():
    """False whatever is configured, as snapshots cannot be attached; and a warning where it is."""
    for configured in (True, False, None):
        with mock.patch("island_fast.driver.LOG") as log:
            answer = driver(backup_use_temp_snapshot=configured).backup_use_temp_snapshot()
        if answer is not False or log.warning.called != bool(configured):
            print(f"backup_use_temp_snapshot={configured}: {answer}, {log.warning.mock_calls}")


def check_delete_of_a_volume_that_failed_to_be_managed():
    """What was to be managed stays; any other volume is removed."""
    for status, removed in (("error_managing_deleting", False), ("deleting", True)):
        one = driver()
        one.delete_volume(mock.Mock(status=status))
        if one._volumes.delete.called != removed:
            print(f"delete_volume of a volume in status {status}: {one._volumes.mock_calls}")


logging.disable()
check_backup_use_temp_snapshot()
check_delete_of_a_volume_that_failed_to_be_managed()
