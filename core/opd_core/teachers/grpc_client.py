"""Teachers behind Triton: many requests in flight over several replicas, retried, never answered by a guess."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
import tritonclient.grpc.aio as triton
from torch import Tensor
from tritonclient.utils import InferenceServerException

from opd_core.conditioning import Conditioning
from opd_core.errors import OPDError, RefusedError, UnavailableError
from opd_core.teachers import contract
from opd_core.teachers.client import ClientStats
from opd_core.teachers.contract import ServiceInfo
from opd_core.teachers.wire import Rows, checked_velocity, key_of, query_inputs, register_inputs

_T = TypeVar("_T")

# gRPC waits up to two minutes between connection attempts by itself; a restarted teacher should be found sooner. A
# machine that is lost closes no connection: without pings the kernel holds on to it for a quarter of an hour. Teachers
# take more pings than other servers (opd_serving.teacher).
_CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # a proxy is for the way out: https://github.com/grpc/grpc/issues/29718
]
# CANCELLED by a server that ends; what this client cancels never comes back as an error.
_RETRYABLE = {"StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED"}
_LEAVING = "has no available versions"  # of a server told to stop: it unloads its model before it closes its port
_DEAD_STUB = "Stub process"  # is INTERNAL; https://github.com/triton-inference-server/server/issues/7230


@dataclass(frozen=True)
class Patience:
    """How long a client tries. Queries are pure, so asking again is safe. After a try that was too short the next has
    twice the time, and a server whose answers took long gets twice as long as the slowest at once: a slow GPU or a full
    queue is told from a server that hangs by waiting, not by a setting."""

    attempt_seconds: float = 60.0  # of the first try
    total_seconds: float = 600.0  # of all
    first_pause: float = 0.1
    longest_pause: float = 5.0
    silence_seconds: float = 20.0  # of a connection with a question; then it is pinged, and has as long again


@dataclass(eq=False)
class _Replica:
    address: str
    client: Any
    info: ServiceInfo | None = None
    verified: bool = False  # that who answers is still who answered first
    away: bool = False  # did not answer when it was asked last; it is asked nothing while another one answers
    slowest: float = 0.0  # seconds of an answer
    outstanding: int = 0
    registered: set[bytes] = field(default_factory=set)


class GrpcTeachers:
    """`TeacherClient` over gRPC. Every server says which teachers it holds; rows go to the least busy one that fits."""

    def __init__(self, addresses: Sequence[str], patience: Patience = Patience()) -> None:
        self.stats = ClientStats()
        self._patience = patience
        self._waits = True
        self._repeated: set[asyncio.Timeout] = set()  # tries in flight that are not the first of their question
        self._jitter = random.Random()  # noqa: S311  (spreads retries; nothing secret)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-client", daemon=True)
        self._thread.start()
        self._watches: set[asyncio.Task[None]] = set()  # of replicas that are away; asyncio itself forgets tasks
        self._replicas = [_Replica(address, self._run(self._open(address))) for address in addresses]

    # ------------------------------------------------------------------------------------------ interface

    def describe(self) -> ServiceInfo:
        infos = [
            self._run(self._with_retries([replica], self._describe, "teacher server")) for replica in self._replicas
        ]
        first = infos[0]
        merged: dict[str, str] = {}
        for replica, info in zip(self._replicas, infos, strict=True):
            replica.info, replica.verified = info, True
            for name in ("base", "precision", "max_sequence_length", "latents", "conditioning"):
                if getattr(info, name) != getattr(first, name):
                    raise RefusedError(
                        f"teacher servers disagree about {name}: {replica.address} says {getattr(info, name)}, "
                        f"{self._replicas[0].address} says {getattr(first, name)}; start them from one spec"
                    )
            for teacher, digest in info.teachers.items():
                if merged.setdefault(teacher, digest) != digest:
                    raise RefusedError(
                        f"teacher servers hold different teachers named {teacher}; start them from one spec"
                    )
        return first.model_copy(update={"teachers": merged})

    def submit(
        self,
        teacher: str,
        latents: Tensor,
        sigmas: Tensor,
        scales: Tensor,
        conditioning: Sequence[Conditioning],
        negative: Conditioning,
        base: bool = False,
        branches: bool = False,
    ) -> "Future[Tensor]":
        rows = Rows(
            teacher=teacher,
            latents=latents.detach().cpu(),
            sigmas=sigmas.detach().cpu().float(),
            scales=scales.detach().cpu().float(),
            conditioning=list(conditioning),
            negative=negative,
            base=base,
            branches=branches,
        )
        return asyncio.run_coroutine_threadsafe(self._query(rows), self._loop)

    def stop_waiting(self) -> None:
        self._waits = False
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_repeated)

    def _end_repeated(self) -> None:
        for limit in self._repeated:
            if not limit.expired():
                limit.reschedule(self._loop.time())

    def close(self) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    # ------------------------------------------------------------------------------------------ one query

    async def _query(self, rows: Rows) -> Tensor:
        holders = [replica for replica in self._replicas if replica.info and rows.teacher in replica.info.teachers]
        if not holders:
            addresses = ", ".join(replica.address for replica in self._replicas)
            raise RefusedError(f"no server at {addresses} holds a teacher {rows.teacher}")
        return torch.cat(await asyncio.gather(*(self._ask(holders, part) for part in rows.split(contract.MAX_ROWS))))

    async def _ask(self, holders: Sequence[_Replica], rows: Rows) -> Tensor:
        async def attempt(replica: _Replica) -> Tensor:
            info = await self._verified(replica)
            await self._register(replica, info, [*rows.conditioning, rows.negative])
            wanted = contract.BRANCHES if rows.branches else contract.VELOCITY
            answer = await self._infer(replica, query_inputs(info, rows), wanted)
            return checked_velocity(answer, rows, replica.address)

        return await self._with_retries(holders, attempt, f"teacher {rows.teacher}")

    async def _verified(self, replica: _Replica) -> ServiceInfo:
        """After a failure another program may answer at the address; it must be the same service."""
        assert replica.info is not None
        if not replica.verified:
            now = await self._describe(replica)
            if now != replica.info:
                raise RefusedError(
                    f"the teacher server at {replica.address} came back as another one; start it from this spec"
                )
            replica.verified = True
        return replica.info

    async def _register(self, replica: _Replica, info: ServiceInfo, conditioning: Iterable[Conditioning]) -> None:
        keyed = ((key_of(info, c), c) for c in conditioning)
        new = {key: c for key, c in keyed if key not in replica.registered}
        if not new:
            return
        for _, alike in groupby(sorted(new.values(), key=lambda c: c.shapes), key=lambda c: c.shapes):
            batch = list(alike)
            for start in range(0, len(batch), contract.MAX_ROWS):
                rows = batch[start : start + contract.MAX_ROWS]
                await self._infer(replica, register_inputs(info, rows), contract.REGISTERED)
                self.stats.registrations += len(rows)
        replica.registered.update(new)

    async def _with_retries(
        self, candidates: Sequence[_Replica], attempt: Callable[[_Replica], Awaitable[_T]], what: str
    ) -> _T:
        """What `attempt` makes of the least busy replica. One that does not answer is passed over at once and by
        everybody, until it answers a question of ours in the background; only where none answers is there a pause."""
        began, tries, seconds = self._loop.time(), 0, self._patience.attempt_seconds
        deadline = began + self._patience.total_seconds
        while True:
            replica = min(candidates, key=lambda r: (r.away, r.outstanding))
            replica.outstanding += 1
            asked = self._loop.time()
            limit = min(max(seconds, 2 * replica.slowest), deadline - asked)
            try:
                async with self._limited(limit, repeated=tries > 0):
                    answer = await attempt(replica)
                replica.away, replica.slowest = False, max(replica.slowest, self._loop.time() - asked)
                return answer
            except (InferenceServerException, TimeoutError) as error:
                if isinstance(error, InferenceServerException):
                    late, status, message = False, str(error.status()), str(error.message())
                else:
                    late, status, message = True, "", f"it did not answer a try of {self._loop.time() - asked:.1f} s"
                tries += 1
                if "NOT_FOUND" in status and contract.UNKNOWN_KEY in message:
                    # Evicted, or a restarted server, which gRPC reconnects to without a word: look who it is.
                    replica.registered -= contract.missing_keys(message)
                    replica.verified = False
                    at_once = tries == 1
                elif late or status in _RETRYABLE or _DEAD_STUB in message or _LEAVING in message:
                    self._miss(replica)
                    at_once = not all(candidate.away for candidate in candidates)
                    seconds = 2 * limit if late else seconds
                else:
                    raise RefusedError(f"{what} at {replica.address} refused: {message}") from error
                pause = 0.0 if at_once or not self._waits else self._pause(tries)
                await asyncio.sleep(min(pause, deadline - self._loop.time()))
                if not self._waits or self._loop.time() >= deadline:
                    told = "" if self._waits else "told to stop; "
                    raise UnavailableError(
                        f"{what}: no answer from {', '.join(r.address for r in candidates)} within "
                        f"{self._loop.time() - began:.0f} s and {tries} tries; {told}the last error was: {message}"
                    ) from error
                self.stats.retries += 1
            finally:
                replica.outstanding -= 1

    @asynccontextmanager
    async def _limited(self, seconds: float, repeated: bool) -> AsyncIterator[None]:
        async with asyncio.timeout(seconds) as limit:
            if repeated:
                self._repeated.add(limit)
            try:
                yield
            finally:
                self._repeated.discard(limit)

    def _miss(self, replica: _Replica) -> None:
        """Ask nothing of it but whether it is back."""
        replica.verified = False
        if not replica.away:
            replica.away = True
            task = self._loop.create_task(self._await_return(replica))
            self._watches.add(task)
            task.add_done_callback(self._watches.discard)

    async def _await_return(self, replica: _Replica) -> None:
        tries = 0
        while replica.away:
            tries += 1
            await asyncio.sleep(self._pause(tries))
            try:
                await replica.client.get_model_config(contract.MODEL, client_timeout=self._patience.attempt_seconds)
                replica.away = False  # the next query verifies that it is the same service
            except InferenceServerException:
                continue

    def _pause(self, tries: int) -> float:
        """Seconds before the next try, with jitter."""
        longest: float = min(self._patience.longest_pause, self._patience.first_pause * 2 ** min(tries, 10))
        return longest * self._jitter.uniform(0.5, 1.0)

    # ------------------------------------------------------------------------------------------ gRPC

    async def _open(self, address: str) -> Any:
        silence = int(1000 * self._patience.silence_seconds)
        pings = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
        options = [*_CHANNEL, *((name, silence) for name in pings)]
        return triton.InferenceServerClient(address, channel_args=options)

    async def _infer(self, replica: _Replica, inputs: list[Any], output: str) -> np.ndarray[Any, Any]:
        self.stats.requests += 1
        result = await replica.client.infer(
            contract.MODEL,
            inputs,
            outputs=[triton.InferRequestedOutput(output)],
        )
        answer = result.as_numpy(output)
        if answer is None:
            raise RefusedError(f"the teacher server at {replica.address} answered without {output}")
        return np.asarray(answer)

    async def _describe(self, replica: _Replica) -> ServiceInfo:
        config = await replica.client.get_model_config(contract.MODEL)
        parameters = config.config.parameters
        if contract.DESCRIPTION not in parameters:
            raise RefusedError(f"the model {contract.MODEL} at {replica.address} is not a teacher of Diffusion OPD")
        return ServiceInfo.model_validate_json(parameters[contract.DESCRIPTION].string_value)

    async def _close(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        for replica in self._replicas:
            await replica.client.close()

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def connect(addresses: Sequence[str], patience: Patience = Patience()) -> GrpcTeachers:
    """A client of the teacher servers at `addresses` (host:port).

    Raises:
        UnavailableError: one of them does not answer. RefusedError: they disagree.
    """
    client = GrpcTeachers(addresses, patience)
    try:
        client.describe()
    except OPDError:
        client.close()
        raise
    return client
