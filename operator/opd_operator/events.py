"""Events of a distillation: one object per cause, counted, not one per occurrence."""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import aiohttp

from opd_operator import names
from opd_operator.draft import timestamp
from opd_operator.kube import ApiError, Kube
from opd_operator.outcome import Event

log = logging.getLogger("opd_operator")

_MESSAGE = 1024  # characters, the API server's limit
_REMEMBERED = 4096  # causes whose count is known


class Recorder:
    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._counts: OrderedDict[str, int] = OrderedDict()

    async def post(self, obj: Mapping[str, Any], event: Event) -> None:
        """Events are a courtesy: one that cannot be written stops nothing."""
        metadata, now = obj["metadata"], timestamp(self._kube.now())
        cause = hashlib.sha256(f"{metadata['uid']}/{event.condition}/{event.reason}".encode()).hexdigest()[:16]
        count = self._counts.pop(cause, 0) + 1
        self._counts[cause] = count
        if len(self._counts) > _REMEMBERED:
            self._counts.popitem(last=False)
        text = f"{event.condition}: {event.message or event.reason}"
        content = {
            "metadata": {"name": f"{metadata['name']}.{cause}", "namespace": metadata["namespace"]},
            "involvedObject": {
                **{name: obj[name] for name in ("apiVersion", "kind")},
                **{name: metadata[name] for name in ("name", "namespace", "uid")},
            },
            "type": event.type,
            "reason": event.reason,
            "message": text[:_MESSAGE],
            "source": {"component": names.MANAGER},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": count,
        }
        try:
            await self._kube.record(content)
        except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("%s/%s: event not written: %s", metadata["namespace"], metadata["name"], error)
