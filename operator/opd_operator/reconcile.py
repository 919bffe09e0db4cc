"""One look at one object: read the cache, decide, write the status, then the children."""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from opd_operator import names
from opd_operator.build import build
from opd_operator.cache import Cache, Key, Object
from opd_operator.claims import asked_for, modes
from opd_operator.contest import Contest, by_another
from opd_operator.diff import changes
from opd_operator.events import Recorder
from opd_operator.kube import CLAIM, ApiError, Kube
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
    _rejected: dict[Key, dict[str, str]] = field(default_factory=dict)  # by role: what was refused, and why

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
        claims = {name: await self._modes(key[0], name) for name in sorted(asked_for(obj))}
        rejected = self._rejected.get(key, {})
        observed = observe(children, answers.progress, answers.requests, rejected, claims, answers.taught)
        now = self.kube.now()
        plan = advance(obj, observed, self.settings.images, now)
        obj = await self._write_status(obj, plan)
        if plan.delete:
            await self.kube.delete(obj)
            return
        if plan.distillation is not None and plan.wanted is not None:
            desired = build(obj, plan.distillation, plan.status["run"], plan.wanted, self.settings)
            due = changes(desired, children, plan.wanted.keep, self.contest.settled)
            for child in due.free:
                await self.kube.delete(child)
            await self._apply(key, due.apply, children)
            for child in due.sweep:
                await self.kube.delete(child)
        if plan.wake is not None:
            self.queue.add_after(key, plan.wake - now)

    async def _modes(self, namespace: str, claim: str) -> list[str]:
        """Access modes of a claim; of one that is not there the scheduler speaks."""
        try:
            return modes(await self.kube.get(CLAIM, namespace, claim))
        except ApiError as error:
            if not error.refused and not error.not_found:
                raise
            log.warning("claim %s/%s is not looked at: %s", namespace, claim, error)
            return []

    async def _apply(self, key: Key, manifests: list[dict[str, Any]], children: Iterable[Object]) -> None:
        """What is refused holds up what its role has after it, and nothing else; what all pods need holds up all."""
        refused: dict[str, str] = {}
        contested: dict[str, str] = {}
        first: ApiError | None = None
        for manifest in manifests:
            role = manifest["metadata"]["labels"][names.ROLE]
            if role in refused or names.SHARED in refused:
                continue
            if pause := self.contest.pause(manifest):
                contested[role] = said = by_another(manifest, children)
                log.warning("%s/%s: %s; again in %.0f s", *key, said, pause)
                self.queue.add_after(key, pause)
                continue
            try:
                applied = await self.kube.apply(manifest)
            except ApiError as error:
                if not error.refused or error.namespace_terminating:
                    raise
                refused[role] = f"{manifest['kind']} {manifest['metadata']['name']}: {error.message}"
                first = first or error
                continue
            self.contest.applied(manifest, applied)
            self.cache.put({"apiVersion": manifest["apiVersion"], "kind": manifest["kind"], **applied})
        told = {**contested, **refused}
        if told != self._rejected.pop(key, {}):
            self.queue.add(key)  # for the status; the retry is for the object
        if told:
            self._rejected[key] = told
        if first:
            raise first

    async def _write_status(self, obj: Mapping[str, Any], plan: Plan) -> Mapping[str, Any]:
        """Only a changed one; somebody else's write in between makes this look worthless, and another one follows."""
        if plan.status == (obj.get("status") or {}):
            return obj
        written = await self.kube.write_status(obj, plan.status)
        self.cache.put(written)
        for event in plan.events:
            await self._recorder.post(obj, event)
        return written
