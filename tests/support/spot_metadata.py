"""A metadata service that answers as that of AWS does: tokens, and the notice that a spot instance is taken back."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Metadata:
    """A metadata service of version 2: no answer without a token; the answers to the notice's address in turn."""

    answers: list[str | None]
    """What each request gets; None is a 404, and the last is repeated."""
    url: str = ""
    refuses: int = 0
    """Requests for a token that get none, before those that do."""
    tokens: int = 0
    asked: int = 0
    without_token: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def metadata(*answers: str | None) -> Iterator[Metadata]:
    service = Metadata(list(answers))

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            with service.lock:
                right = (
                    self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                )
                if service.refuses or not right:
                    service.refuses -= 1
                    return self.reply(None)
                service.tokens += 1
                return self.reply(f"token-{service.tokens}")

        def do_GET(self) -> None:
            with service.lock:
                if self.headers["X-aws-ec2-metadata-token"] != f"token-{service.tokens}":
                    service.without_token += 1
                if self.path != "/latest/meta-data/spot/instance-action":
                    return self.reply(None)
                service.asked += 1
                return self.reply(service.answers[min(service.asked, len(service.answers)) - 1])

        def reply(self, text: str | None) -> None:
            if text is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def notice(seconds: int) -> str:
    when = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": when.strftime("%Y-%m-%dT%H:%M:%SZ")})
