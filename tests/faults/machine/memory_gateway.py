"""The account behind a gateway that refuses no PUT, as Ceph's is by its Swift API.

Everybody sees at once what was stored, and a PUT stores whatever the name holds already. A PUT that its
sender gave up arrives within an hour. Nothing else is eventual: no node is ever behind.
"""

from __future__ import annotations

from dataclasses import replace

from tests.faults.machine.memory_swift import Account, Copy, Late, refusal

LATEST = 3590.0  # seconds after which a PUT that was held up has arrived


class Gateway(Account):
    """See above. What is down is down for everybody: then nothing answers."""

    def put(self, name: str, data: bytes, away: set[int], late: float | None = None) -> None:
        answers = not away
        if answers or self.random.random() < 0.3:
            copy = Copy(self.next_stamp(), self.now, data)
            for node in range(len(self.nodes)):
                self._keep(node, name, copy)
            self.first.setdefault(name, self.now)
            self.rows[name] = (len(data), self.now)
        if not answers:
            raise refusal(503, "Service Unavailable")

    def delete(self, name: str, away: set[int], unknown: bool) -> None:
        if away:
            raise refusal(503, "Service Unavailable")
        if not unknown and "-claim-" not in name:
            self.youngest = min(self.youngest, self.now - self.first.get(name, 0.0))
        if not self.holds(name):
            raise refusal(404, "Not Found")
        copy = Copy(self.next_stamp(), self.now, None)
        for node in range(len(self.nodes)):
            self._keep(node, name, copy)
        self.rows.pop(name, None)

    def listing(self, prefix: str, marker: str, partial: bool) -> dict[str, tuple[int, float]]:
        return super().listing(prefix, marker, False)

    def thin(self) -> bool:
        return True  # so no node goes away

    def hold(self, late: Late) -> None:
        self.late.append(replace(late, stamp=None, at=self.now))

    def land_due(self, by: float) -> None:
        """What was held up arrives before the time `by`."""
        due = [late for late in self.late if late.at + LATEST <= by]
        self.late = [late for late in self.late if late.at + LATEST > by]
        for late in due:
            self.put(late.name, late.data, set())
