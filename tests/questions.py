"""A question to a server that is no client library's: any bytes, and the first line of what comes back."""

import asyncio


async def asked(port: int, question: bytes) -> bytes:
    """The answer's first line; empty where there is none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(question)
    try:
        return (await reader.read()).partition(b"\r\n")[0]
    except ConnectionResetError:
        return b""
    finally:
        writer.close()
