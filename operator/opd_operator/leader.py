"""One operator at work at a time: a Lease held through the official client's leader election."""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from kubernetes.aio.client import ApiClient, V1Lease, V1ObjectMeta
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

log = logging.getLogger("opd_operator")

# As controller-runtime has them: another one takes over 15 s after the last sign of life, plus a look every 2 s.
LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15, 10, 2
_REQUEST_SECONDS = 4.0  # a request that hangs must not outlive the lease
_UNREACHABLE = (aiohttp.ClientError, TimeoutError, OSError)


class LeaseLostError(Exception):
    """Somebody else is, or will be, at work."""


class _Lease(LeaseLock):  # type: ignore[misc]  # the client ships no types that mypy can follow
    """An API server that does not answer is a failed try, not the end of the process, and no try takes for ever: the
    client's own lock lets both through (kubernetes 37.0, leaselock.py)."""

    async def get(self, name: str, namespace: str) -> tuple[bool, Any]:
        try:
            return await asyncio.wait_for(super().get(name, namespace), _REQUEST_SECONDS)
        except _UNREACHABLE as error:
            return False, ApiException(status=0, reason=repr(error))

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        lease = V1Lease(metadata=V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        try:
            # Without `pretty=True`, which the client's own argument check refuses.
            await asyncio.wait_for(self.api_instance.create_namespaced_lease(namespace, lease), _REQUEST_SECONDS)
        except (ApiException, *_UNREACHABLE) as error:
            log.warning("the lease %s/%s cannot be made: %r", namespace, name, error)
            return False
        return True

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        try:
            return bool(await asyncio.wait_for(super().update(name, namespace, updated_record), _REQUEST_SECONDS))
        except _UNREACHABLE as error:
            log.warning("the lease %s/%s cannot be renewed: %r", namespace, name, error)
            return False

    async def release(self) -> None:
        """Leave it to whoever looks next; without this they wait until it has run out."""
        held, lease = await self.get(self.name, self.namespace)
        if not held or lease is None or lease.holder_identity != self.identity:
            return
        self.lease_reference.spec.holder_identity = ""
        try:
            written = self.api_instance.replace_namespaced_lease(self.name, self.namespace, self.lease_reference)
            await asyncio.wait_for(written, _REQUEST_SECONDS)
        except (ApiException, *_UNREACHABLE) as error:
            log.warning("the lease %s/%s runs out by itself: %r", self.namespace, self.name, error)


async def lead(client: ApiClient, name: str, namespace: str, play: Callable[[], Awaitable[None]]) -> None:
    """Wait for the lease, then `play` while it is held. Cancelled, it ends `play` first and then gives the lease back.

    Raises:
        LeaseLostError: what this process knows may be old; it should end.
    """
    playing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task: asyncio.Task[None] | None = None

    async def started() -> None:
        nonlocal task
        task = asyncio.ensure_future(play())
        try:
            await task
        finally:
            if not playing.done():
                playing.set_result(None)

    identity = f"{os.environ.get('HOSTNAME') or socket.gethostname()}-{os.getpid()}"
    lock = _Lease(name, namespace, identity, client)
    election = LeaderElection(Config(lock, LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, started, None))
    campaign = asyncio.create_task(election.run())
    try:
        await asyncio.wait([playing, campaign], return_when=asyncio.FIRST_COMPLETED)
        if not playing.done():
            await campaign
            raise LeaseLostError(f"the lease {namespace}/{name} is lost")
    finally:
        campaign.cancel()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # nothing is written once the lease is another's
            await lock.release()
    if task is not None and not task.cancelled() and (error := task.exception()):
        raise error
