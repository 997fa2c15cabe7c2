"""`edgeguard serve`: the guard over HTTP, for the programs of this machine."""

from __future__ import annotations

import ipaddress
import math
import signal
import socket
from typing import Annotated, Any

import typer

from edgeguard.cli.check import BackendName, BackendOption, DeviceOption, ModelOption, ProfileOption, ThreadsOption
from edgeguard.cli.console import waiting, warn, write
from edgeguard.cli.inputs import NeutraliseOption, PolicyOption
from edgeguard.errors import RuntimeMissingError
from edgeguard.guard import Guard

GRACE = 10
"""Seconds that checks get when the server is stopped; then they are cancelled and answered with 503."""
FAREWELL = 5
"""Seconds for those answers to leave."""


def serve(
    model: ModelOption = None,
    backend: BackendOption = BackendName.AUTO,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    profile: ProfileOption = None,
    policy: PolicyOption = None,
    neutralise: NeutraliseOption = False,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; others than loopback open it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8080,
    max_bytes: Annotated[int, typer.Option("--max-bytes", min=1, help="Largest body of a request.")] = 1 << 20,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Checks that may wait; more are answered with 429.")] = 16,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for a check, its wait included.")] = 60.0,
) -> None:
    """Serve checks over HTTP: POST /check, GET /health (extra: server).

    Example: curl -d '{"text": "How do I kill a Python process?"}' -H 'Content-Type: application/json' 127.0.0.1:8080/check
    """
    if not (timeout > 0 and math.isfinite(timeout)):
        raise typer.BadParameter("--timeout must be a positive number of seconds.")
    try:
        import uvicorn

        from edgeguard.server import LOOPBACK, create_app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("edgeguard"):
            raise
        raise RuntimeMissingError("starlette and uvicorn", "server") from error
    except ImportError as error:
        raise RuntimeMissingError("starlette or uvicorn", "server", str(error)) from error
    import asyncio  # slow, and the other commands do without

    from edgeguard.aio import AsyncGuard

    with listen(host, port) as listening:
        address, port = listening.getsockname()[:2]
        inside = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        if not inside:
            warn([f"Listening on {address}: whoever reaches this machine can ask and read verdicts; nothing is encrypted."])
        with waiting("Loading the model"):
            guard = Guard.load(
                model, backend=backend.value, device=device, threads=threads, profile=profile, policy=policy, neutralise=neutralise
            )
            guard.warmup()
        app = create_app(
            AsyncGuard(guard), max_bytes=max_bytes, queue=queue, timeout=timeout, hosts=LOOPBACK if inside else None
        )
        # no log of any kind: neither requests nor tracebacks, which can hold texts
        config = uvicorn.Config(
            app, loop="asyncio", http="h11", ws="none", lifespan="on", log_config=None, log_level="critical", access_log=False,
            proxy_headers=False, server_header=False, timeout_graceful_shutdown=GRACE + FAREWELL,
        )  # fmt: skip

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                asyncio.get_running_loop().call_later(GRACE, app.state.stop)
                await super().shutdown(sockets)

        server = Server(config)

        def stop(*_: Any) -> None:  # noqa: ANN401
            server.should_exit = True

        for number in (signal.SIGINT, signal.SIGTERM):  # being stopped is no error; uvicorn hands its signals on when it is done
            signal.signal(number, stop)
        identity = guard.identity
        write(f"Serving {identity.name} ({identity.backend} on {identity.device}) at {_url(address, port)}")
        server.run([listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address and listening; a usage error when that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise typer.BadParameter(f"--host {host} --port {port} cannot be listened on: {error.strerror}.") from error


def _url(address: str, port: int) -> str:
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
