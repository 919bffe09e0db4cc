"""What Kubernetes tells about an object and its pods."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """`time`: of its last occurrence, RFC 3339; `object`: kind/name of what it is about."""

    time: str
    type: str
    reason: str
    object: str
    message: str
    count: int


def event(item: Mapping[str, Any]) -> Event:
    """Of v1: some writers fill in `series`, some `lastTimestamp`, some `eventTime`."""
    about, series = item["involvedObject"], item.get("series") or {}
    times = (series.get("lastObservedTime"), item.get("lastTimestamp"), item.get("eventTime"))
    return Event(
        time=next((time for time in times if time), item["metadata"]["creationTimestamp"]),
        type=item.get("type", ""),
        reason=item.get("reason", ""),
        object=f"{about['kind']}/{about['name']}",
        message=item.get("message", ""),
        count=series.get("count") or item.get("count") or 1,
    )
