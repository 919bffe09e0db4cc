"""/livez and /readyz: whether the loop turns, and whether the cache may be trusted."""

from collections.abc import Callable

from aiohttp import web

_STUCK_SECONDS = 120.0


async def serve_probes(port: int, *, ready: Callable[[], bool], oldest: Callable[[], float]) -> web.AppRunner:
    """Args:
    ready: whether everything has been listed; a follower is ready too, it waits for the lease.
    oldest: seconds that the head of the queue has been waiting.
    """

    async def livez(_: web.Request) -> web.Response:
        # That this answers shows that the loop turns; that nobody waits for ever shows that the workers do.
        waiting = oldest()
        return web.Response(status=503 if waiting > _STUCK_SECONDS else 200, text=f"queue head {waiting:.0f} s\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if ready() else web.Response(status=503, text="listing\n")

    app = web.Application()
    app.add_routes([web.get("/livez", livez), web.get("/readyz", readyz)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", port).start()  # noqa: S104  (the kubelet asks from outside the pod)
    return runner
