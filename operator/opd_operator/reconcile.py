"""One look at one object: read the cache, decide, write the status, then the children."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from opd_core.api.types import KIND

from opd_operator import names
from opd_operator.build import build
from opd_operator.cache import Cache, Key
from opd_operator.contest import Contest
from opd_operator.diff import changes
from opd_operator.events import Recorder
from opd_operator.kube import ApiError, Kube
from opd_operator.metrics import Metrics
from opd_operator.observe import observe
from opd_operator.peers import Answers, Peers
from opd_operator.plan import Plan, advance
from opd_operator.queue import WorkQueue
from opd_operator.settings import Settings

log = logging.getLogger("opd_operator")


@dataclass
class Reconciler:
    kube: Kube
    cache: Cache
    queue: WorkQueue[Key]
    metrics: Metrics
    settings: Settings
    peers: Peers
    contest: Contest = field(default_factory=Contest)
    _rejected: dict[Key, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._recorder = Recorder(self.kube)

    async def handle(self, key: Key, waited: float) -> None:
        """Reconcile, and come back if it did not work."""
        began, result = time.monotonic(), "success"
        try:
            await self.reconcile(key)
            self.queue.forget(key)
        except ApiError as error:
            result = "conflict" if error.conflict else "error"
            if error.namespace_terminating:
                log.info("%s/%s: the namespace is going; nothing is made any more", *key)
            else:
                pause = self.queue.retry(key, at_least=error.retry_after)
                log.warning("%s/%s: %s; again in %.1f s", *key, error, pause)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            result = "error"
            pause = self.queue.retry(key)
            log.warning("%s/%s: the API server does not answer (%r); again in %.1f s", *key, error, pause)
        except Exception:
            result = "panic"
            log.exception("%s/%s: a defect of the operator; again in %.1f s", *key, self.queue.retry(key))
        self.metrics.reconciled(result, time.monotonic() - began, waited)

    async def reconcile(self, key: Key) -> None:
        obj = self.cache.get(key)
        if obj is None or "deletionTimestamp" in obj["metadata"]:
            self._rejected.pop(key, None)  # the garbage collector takes the children
            return
        if obj["spec"].get("managedBy", names.MANAGED_BY) != names.MANAGED_BY:
            return
        children, answers = self.cache.children(obj), self.peers.answers.get(key, Answers())
        observed = observe(children, answers.progress, answers.requests, self._rejected.get(key, ""))
        now = self.kube.now()
        plan = advance(obj, observed, self.settings.images, now)
        obj = await self._write_status(obj, plan)
        if plan.delete:
            await self.kube.delete(obj)
            return
        if plan.distillation is not None and plan.wanted is not None:
            desired = build(obj, plan.distillation, plan.status["run"], plan.wanted, self.settings)
            due = changes(desired, children, plan.wanted.keep)
            for child in due.free:
                await self.kube.delete(child)
            await self._apply(key, due.apply)
            for child in due.sweep:
                await self.kube.delete(child)
        if plan.wake is not None:
            self.queue.add_after(key, plan.wake - now)

    async def _apply(self, key: Key, manifests: list[dict[str, Any]]) -> None:
        for manifest in manifests:
            if pause := self.contest.pause(manifest):
                said = f"{manifest['kind']} {manifest['metadata']['name']} is changed again and again by somebody else"
                log.warning("%s/%s: %s; again in %.0f s", *key, said, pause)
                self.queue.add_after(key, pause)
                continue
            try:
                applied = await self.kube.apply(manifest)
            except ApiError as error:
                if error.refused and not error.namespace_terminating:
                    said = f"{manifest['kind']} {manifest['metadata']['name']}: {error.message}"
                    if self._rejected.get(key) != said:
                        self._rejected[key] = said
                        self.queue.add(key)  # for the status; the retry is for the object
                raise
            self.cache.put({"apiVersion": manifest["apiVersion"], "kind": manifest["kind"], **applied})
        if self._rejected.pop(key, None):
            self.queue.add(key)

    async def _write_status(self, obj: Mapping[str, Any], plan: Plan) -> Mapping[str, Any]:
        """Only a changed one; somebody else's write in between makes this look worthless, and another one follows."""
        if plan.status == (obj.get("status") or {}):
            return obj
        metadata = obj["metadata"]
        content = {
            "apiVersion": obj["apiVersion"],
            "kind": KIND,
            "metadata": {name: metadata[name] for name in ("name", "namespace", "uid", "resourceVersion")},
            "status": plan.status,
        }
        written = await self.kube.apply(content, subresource="status")
        self.cache.put(written)
        for event in plan.events:
            await self._recorder.post(obj, event)
        return written
