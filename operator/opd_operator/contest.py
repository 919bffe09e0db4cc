"""Another manager that writes what this one writes: without a pause the two would fight as fast as they can."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opd_operator import names

_FREE, _WINDOW = 5, 60.0  # so many writes of one manifest within so many seconds are no fight
_LONGEST = 300.0


@dataclass
class _Record:
    digest: str
    count: int = 0
    since: float = 0.0
    until: float = 0.0


@dataclass
class Contest:
    clock: Callable[[], float] = time.monotonic
    _records: dict[tuple[str, str, str], _Record] = field(default_factory=dict)

    def pause(self, manifest: Mapping[str, Any]) -> float:
        """Seconds to wait before `manifest` is applied; 0: now, and it is counted."""
        metadata, now = manifest["metadata"], self.clock()
        key, digest = (
            (manifest["kind"], metadata["namespace"], metadata["name"]),
            metadata["annotations"][names.MANIFEST],
        )
        record = self._records.get(key)
        if record is None or record.digest != digest or now - max(record.since, record.until) > _WINDOW:
            self._records[key] = _Record(digest, 1, now)
            self._forget(now)
            return 0.0
        if now < record.until:
            return record.until - now
        record.count += 1
        record.since = now
        if record.count > _FREE:
            record.until = now + min(2.0 ** (record.count - _FREE), _LONGEST)
        return 0.0

    def _forget(self, now: float) -> None:
        """Records of objects that nobody has written for long."""
        if len(self._records) > 10_000:
            self._records = {
                key: record for key, record in self._records.items() if now - max(record.since, record.until) < _WINDOW
            }
