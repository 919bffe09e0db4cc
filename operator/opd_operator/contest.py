"""Another manager that writes what this one writes: without a pause the two would fight as fast as they can. And rules
of the cluster that change what is written: what they make of it is what can be had."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opd_core.api.digests import digest

from opd_operator import names
from opd_operator.diff import differs, shown
from opd_operator.words import printable

_FREE, _WINDOW = 5, 60.0  # so many writes of one manifest within so many seconds are no fight
_LONGEST = 300.0
_REMEMBERED = 10_000


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
    _made: OrderedDict[tuple[str, str, str], tuple[str, str]] = field(default_factory=OrderedDict)

    def pause(self, manifest: Mapping[str, Any]) -> float:
        """Seconds to wait before `manifest` is applied; 0: now, and it is counted."""
        key, now, written = _key(manifest), self.clock(), manifest["metadata"]["annotations"][names.MANIFEST]
        record = self._records.get(key)
        if record is None or record.digest != written or now - max(record.since, record.until) > _WINDOW:
            self._records[key] = _Record(written, 1, now)
            self._forget(now)
            return 0.0
        if now < record.until:
            return record.until - now
        record.count += 1
        record.since = now
        if record.count > _FREE:
            record.until = now + min(2.0 ** (record.count - _FREE), _LONGEST)
        return 0.0

    def applied(self, manifest: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """What the API server made of `manifest`: with webhooks and admission policies it may be something else."""
        key = _key(manifest)
        self._made.pop(key, None)
        if differs(manifest, answer):
            self._made[key] = _made(manifest, answer)
            if len(self._made) > _REMEMBERED:
                self._made.popitem(last=False)

    def settled(self, manifest: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
        """Whether `found` is what `manifest` became when it was applied last: it would become so again."""
        return _key(manifest) in self._made and self._made[_key(manifest)] == _made(manifest, found)

    def _forget(self, now: float) -> None:
        """Records of objects that nobody has written for long."""
        if len(self._records) > 10_000:
            self._records = {
                key: record for key, record in self._records.items() if now - max(record.since, record.until) < _WINDOW
            }


def by_another(manifest: Mapping[str, Any], children: Iterable[Mapping[str, Any]]) -> str:
    """Who writes against `manifest`, as far as what is there tells, and what helps."""
    metadata = manifest["metadata"]
    said = f"{manifest['kind']} {metadata['name']} is changed again and again by "
    same = [each["metadata"] for each in children if each["kind"] == manifest["kind"]]
    there: Mapping[str, Any] = next((each for each in same if each["name"] == metadata["name"]), {})
    other = (there.get("annotations") or {}).get(names.INSTALLATION)
    if other in (None, metadata["annotations"][names.INSTALLATION]):
        return f"{said}somebody else"
    return printable(
        f"{said}the operator of {other}, which looks after this namespace, too: uninstall one of them, or give each "
        "watchNamespaces of its own"
    )


def _key(manifest: Mapping[str, Any]) -> tuple[str, str, str]:
    return manifest["kind"], manifest["metadata"]["namespace"], manifest["metadata"]["name"]


def _made(manifest: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, str]:
    metadata = {key: value for key, value in manifest["metadata"].items() if key != "uid"}
    return metadata["annotations"][names.MANIFEST], digest(shown({**manifest, "metadata": metadata}, found))
