"""What libvirt's errors about a guest's agent mean: a libvirt sends one code, and no host has several."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from island_fast.errors import IslandError, RefusedError
from island_fast.qemu.libvirt import Domain

FREEZE = "guest-fsfreeze-freeze"


class LibvirtError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self._code = code

    def get_error_code(self) -> int:
        return self._code


def ask(error: Exception, **codes: int) -> object:
    """What a domain says whose libvirt answers with an error; `codes` are those that its binding knows."""

    def answer(*_: object) -> str:
        raise error

    domain: Any = Domain.__new__(Domain)
    domain._domain = None
    domain._libvirt = SimpleNamespace(libvirtError=LibvirtError, VIR_ERR_INTERNAL_ERROR=1, **codes)
    domain._libvirt_qemu = SimpleNamespace(qemuAgentCommand=answer)
    return domain.ask_agent(FREEZE, 5)


@pytest.mark.parametrize(
    "code, text",
    [
        (1, f"internal error: unable to execute QEMU agent command '{FREEZE}': disabled"),  # 9.0
        (
            113,
            f"guest agent command failed: unable to execute QEMU agent command '{FREEZE}': disabled",
        ),  # 11.3
    ],
)
@pytest.mark.parametrize("codes", [{}, {"VIR_ERR_AGENT_COMMAND_FAILED": 113}], ids=["old", "new"])
def test_a_refusal_is_known_by_each_code(code: int, text: str, codes: dict[str, int]) -> None:
    with pytest.raises(RefusedError, match=f"its agent refused {FREEZE}"):
        ask(LibvirtError(code, text), **codes)


@pytest.mark.parametrize(
    "code, text",
    [
        (1, "internal error: the guest is gone"),
        (86, "Guest agent is not responding: QEMU guest agent is not connected"),
        (112, f"guest agent command timed out: '{FREEZE}'"),
        (113, "guest agent command failed: 'guest-sync' has no answer"),
    ],
)
def test_silence_is_no_refusal(code: int, text: str) -> None:
    """The guest may be frozen then."""
    with pytest.raises(IslandError, match=f"its agent did not answer {FREEZE}") as caught:
        ask(LibvirtError(code, text))
    assert not isinstance(caught.value, RefusedError)
