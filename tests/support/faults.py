"""A proxy between a client and a real S3 store that breaks chosen answers on cue.

Every byte passes as it came, so signatures stay valid; it knows just enough HTTP to tell one request from the
next, to count them, and to spoil an answer.
"""

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_KINDS = ("hang", "slow", "reset", "truncate", "corrupt", "drip")


@dataclass
class Fault:
    """Spoil the next `times` answers to requests whose line ("GET /bucket/key") matches `pattern`.

    Their headers contain `header`, and not `lacking`.
    """

    kind: str
    pattern: str
    times: int
    share: float
    header: str
    lacking: str | None


@dataclass
class FaultProxy:
    """A running proxy. `requests` holds the request lines seen, `in_flight` what is unanswered now."""

    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    """Of each of `requests`, in small letters."""
    connections: int = 0
    """Connections of clients so far."""
    in_flight: int = 0
    max_in_flight: int = 0
    gate: int = 0
    """Hold GET answers back until this many requests wait at once; proves that so many really do."""
    delay_seconds: float = 0.0
    """How long each GET answer takes at least, as if the store were far away."""
    drip_seconds: float = 0.05
    """Pause after each byte of an answer that drips."""
    slow_seconds: float = 2.0
    """How much longer a slow answer takes."""
    bytes_answered: int = 0
    """Bytes of answers passed on, without their heads."""
    go_down: Callable[[], None] = lambda: None
    """Refuse connections, and reset those that there are."""
    come_up: Callable[[], None] = lambda: None
    """Accept connections again, at the same address."""
    _faults: list[Fault] = field(default_factory=list)
    _chance: random.Random = field(default_factory=lambda: random.Random(0))

    def fail(
        self,
        kind: str,
        *,
        pattern: str = "^GET ",
        times: int = 1,
        share: float = 1.0,
        header: str = "",
        lacking: str | None = None,
    ) -> None:
        """Queue a fault of a `share` of the requests: one of _KINDS, or of _ANSWERS."""
        if kind not in (*_ANSWERS, *_KINDS):
            raise ValueError(kind)
        self._faults.append(Fault(kind, pattern, times, share, header, lacking))

    def heal(self) -> None:
        """Forget all faults that are queued."""
        self._faults.clear()

    def count(self, pattern: str) -> int:
        """How many requests so far match."""
        return sum(bool(re.search(pattern, line)) for line in self.requests)

    def _fault_for(self, line: str, headers: str) -> str | None:
        for fault in self._faults:
            if fault.header not in headers or (fault.lacking is not None and fault.lacking in headers):
                continue
            if fault.times and re.search(fault.pattern, line) and self._chance.random() < fault.share:
                fault.times -= 1
                return fault.kind
        return None


def _answer(status: str, code: str, message: str = "by the proxy") -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


_ANSWERS = {
    "slow_down": _answer("503 Slow Down", "SlowDown"),
    "internal_error": _answer("500 Internal Server Error", "InternalError"),
    "forbid": _answer("403 Forbidden", "AccessDenied"),
    "archived": _answer("403 Forbidden", "InvalidObjectState"),
    "disabled_key": _answer("400 Bad Request", "KMS.DisabledException"),
    "expired": _answer("400 Bad Request", "ExpiredToken"),
    "no_upload": _answer("404 Not Found", "NoSuchUpload"),
    "not_implemented": _answer("501 Not Implemented", "NotImplemented"),
    "checksum_header": _answer("400 Bad Request", "InvalidArgument", "unknown header of a checksum"),
}


@contextlib.contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy before `upstream` (http://host:port), served by a thread of this process."""
    host, port = upstream.removeprefix("http://").split(":")
    proxy = FaultProxy()
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    servers: list[asyncio.Server] = []
    own_port = 0

    async def listen() -> None:
        servers.append(
            await asyncio.start_server(
                lambda r, w: _Connection(proxy, r, w).serve(host, int(port)),
                "127.0.0.1",
                own_port,
                limit=1 << 20,
            )
        )

    async def close() -> None:
        for server in servers:
            server.close()
        servers.clear()
        here = (asyncio.current_task(), main_task)
        tasks = [task for task in asyncio.all_tasks() if task not in here]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports that were being opened are closed in the next turn

    async def serve() -> None:
        nonlocal own_port, main_task
        main_task = asyncio.current_task()
        await listen()
        own_port = servers[0].sockets[0].getsockname()[1]
        proxy.endpoint = f"http://127.0.0.1:{own_port}"
        started.set()
        await stop.wait()
        await close()

    main_task: asyncio.Task[None] | None = None
    proxy.go_down = lambda: asyncio.run_coroutine_threadsafe(close(), loop).result()
    proxy.come_up = lambda: asyncio.run_coroutine_threadsafe(listen(), loop).result()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    started.wait()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


class _Connection:
    """One client's connection and its twin to the store; serves requests one after another."""

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy, self.reader, self.writer = proxy, reader, writer

    async def serve(self, host: str, port: int) -> None:
        self.proxy.connections += 1
        try:
            up_reader, up_writer = await asyncio.open_connection(host, port, limit=1 << 20)
        except asyncio.CancelledError:  # the proxy goes down
            self.writer.close()
            return
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while await self._one_request(up_reader, up_writer):
                    pass
        finally:
            for writer in (self.writer, up_writer):
                writer.close()

    async def _one_request(self, up_reader: asyncio.StreamReader, up_writer: asyncio.StreamWriter) -> bool:
        """Pass one request and its answer on; False when the connection is done with."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        method, target = head.split(b" ", 2)[:2]
        line = f"{method.decode()} {target.decode()}"
        proxy = self.proxy
        headers = head.partition(b"\r\n")[2].decode("latin-1").lower()
        proxy.requests.append(line)
        proxy.headers.append(headers)
        proxy.in_flight += 1
        proxy.max_in_flight = max(proxy.max_in_flight, proxy.in_flight)
        try:
            fault = proxy._fault_for(line, headers)
            if method == b"GET" and proxy.gate:
                while proxy.in_flight < proxy.gate:
                    await asyncio.sleep(0.005)
                proxy.gate = 0
            if method == b"GET" and proxy.delay_seconds:
                await asyncio.sleep(proxy.delay_seconds)
            if fault == "slow":
                await asyncio.sleep(proxy.slow_seconds)
            if fault == "hang":
                await self.reader.read()  # until the client gives up
                return False
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return False
            if fault in _ANSWERS:
                self.writer.write(_ANSWERS[fault])
                await self.writer.drain()
                return False
            up_writer.write(head)
            body = asyncio.create_task(_copy_body(head, self.reader, up_writer))
            body.add_done_callback(lambda task: task.cancelled() or task.exception())
            try:
                return await self._answer(method, up_reader, fault) and body.done()
            finally:
                body.cancel()
        finally:
            proxy.in_flight -= 1

    async def _answer(self, method: bytes, up_reader: asyncio.StreamReader, fault: str | None) -> bool:
        head = await up_reader.readuntil(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):
            self.writer.write(head)
            head = await up_reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        self.writer.write(head)
        if method == b"HEAD" or status in (204, 304):
            await self.writer.drain()
            return True
        if fault == "truncate":
            self.writer.write(await up_reader.readexactly(_length(head) // 2))
            await self.writer.drain()
            return False
        if fault == "drip":
            return await self._drip(await up_reader.readexactly(_length(head)))
        self.proxy.bytes_answered += _length(head)
        await _copy_body(head, up_reader, self.writer, _flip_middle_byte if fault == "corrupt" else None)
        return True

    async def _drip(self, data: bytes) -> bool:
        """Send single bytes, each after a pause, until the client gives up."""
        client = asyncio.create_task(self.reader.read())
        for place in range(len(data)):
            self.writer.write(data[place : place + 1])
            await self.writer.drain()
            await asyncio.wait([client], timeout=self.proxy.drip_seconds)
            if client.done():
                return False
        client.cancel()
        return False


async def _copy_body(
    head: bytes,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    change: Callable[[bytes], bytes] | None = None,
) -> None:
    if b"transfer-encoding: chunked" not in head.lower():
        await _copy(reader, writer, _length(head), change)
        return
    size = 1
    while size:
        size_line = await reader.readuntil(b"\r\n")
        size = int(size_line.split(b";")[0], 16)
        writer.write(size_line)
        await _copy(reader, writer, size + 2)


def _flip_middle_byte(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def _length(head: bytes) -> int:
    match = re.search(rb"\r\ncontent-length:\s*(\d+)", head, re.IGNORECASE)
    return int(match[1]) if match else 0


async def _copy(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    length: int,
    change: Callable[[bytes], bytes] | None = None,
) -> None:
    while length:
        data = await reader.read(min(length, 1 << 16))
        if not data:
            raise ConnectionResetError
        length -= len(data)
        if change is not None:
            data, change = change(data), None
        writer.write(data)
        await writer.drain()
