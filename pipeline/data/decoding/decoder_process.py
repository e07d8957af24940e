"""Decode files that may take long, in a process of their own that is ended after a limit of CPU time.

A thread inside a decoder cannot be stopped, a process can: a hostile or damaged file then costs a bounded time, and
one that crashes its decoder does not take the actor with it. Each thread that meets such files has one process for
all of them, which ends with the thread or with its own process. The limit counts CPU time, not time on the clock, so
the load of the machine does not decide which images a run learns from.

Frames on the pipes: 8 bytes of length and the file; answered by `_ANSWER` and the samples after their `_SHAPE`, or the
text of an error.
"""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import IO, NoReturn

import numpy as np

from dinoray.models.errors import ResourceError, one_line
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.pillow import decode_pillow, open_pillow
from dinoray.pipeline.data.decoding.samples import Samples

MAX_CPU_SECONDS = 30.0
"""CPU time for one file. The slowest honest ones take a third: JPEG 2000 of 100 megapixels in 64 MiB."""

_LENGTH = struct.Struct("<Q")
_ANSWER = struct.Struct("<BQd")  # kind, bytes that follow, CPU seconds
_SHAPE = struct.Struct(
    "<IIIB?4s"
)  # height, width, channels, channels that are colours, has alpha, type of number
_PIXELS, _BAD_IMAGE, _DAMAGED = range(3)
_START_PAUSES = (0.1, 0.3, 1.0, 3.0)
"""Seconds between attempts to start a process, which fail while the node has no memory or no process left."""
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_OURS = threading.local()


class DamagedImage(Exception):  # noqa: N818 (as BadImage)
    """What Pillow says of a damaged file."""


class DecoderLost(Exception):  # noqa: N818
    """The process was ended by something else than the file."""


def decode_apart(data: bytes) -> Samples:
    """Decode a file as `decode_pillow` does.

    Raises BadImage if it takes more than MAX_CPU_SECONDS, crashes the decoder, or is twice the one at which the
    process was killed, as happens where memory is short; DamagedImage with what Pillow says if it is damaged;
    ResourceError if no process can be started.
    """
    try:
        return _decode_in_ours(data)
    except DecoderLost:
        pass
    try:
        return _decode_in_ours(data)
    except DecoderLost as error:
        raise BadImage(f"twice not decoded: {error}") from error


def _decode_in_ours(data: bytes) -> Samples:
    process: _DecoderProcess | None = getattr(_OURS, "process", None)
    if process is None or process.owner != os.getpid():  # a fork would share its pipes
        process = _OURS.process = _DecoderProcess()
    try:
        return process.decode(data)
    finally:
        if not process.is_idle:
            del _OURS.process


def thread_seconds() -> float:
    """Return the CPU time of this thread, with what its process for slow files has taken: as `time.thread_time`."""
    return time.thread_time() + float(getattr(_OURS, "seconds", 0.0))


class _DecoderProcess:
    """A process that decodes one file after another for one thread."""

    def __init__(self) -> None:
        self._process = _started()
        self.owner, self.is_idle = os.getpid(), True

    def decode(self, data: bytes) -> Samples:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        self.is_idle = False
        try:
            requests.write(_LENGTH.pack(len(data)))
            requests.write(data)
            requests.flush()
            kind, size, seconds = _ANSWER.unpack(_read(answers, _ANSWER.size))
            body = _read(answers, size)
        except (BrokenPipeError, EOFError):
            self._raise_how_it_ended()
        self.is_idle = True
        _count(seconds)
        if kind == _PIXELS:
            *shape, num_colours, has_alpha, dtype = _SHAPE.unpack_from(body)
            values = np.frombuffer(body, dtype.rstrip(b"\0").decode(), offset=_SHAPE.size)
            return Samples(values.reshape(shape), num_colours, has_alpha)
        raise (BadImage if kind == _BAD_IMAGE else DamagedImage)(body.decode())

    def _raise_how_it_ended(self) -> NoReturn:
        code = self._process.wait()
        if code == -signal.SIGPROF:
            _count(MAX_CPU_SECONDS)
            raise BadImage(f"too slow: not decoded after {MAX_CPU_SECONDS:g} s of CPU time")
        if -code in _CRASHES:
            raise BadImage(f"crashes its decoder: {signal.Signals(-code).name}")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise DecoderLost(f"the process that decodes JPEG 2000, AVIF and JPEG in TIFF was ended by {how}")

    def __del__(self) -> None:
        if getattr(self, "owner", None) != os.getpid():
            return  # of another process, or never started
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # it may hold what the process has not read
                pipe.close()  # type: ignore[union-attr]


def _started() -> subprocess.Popen[bytes]:
    for pause in _START_PAUSES:
        try:
            return _start()
        except OSError:
            time.sleep(pause)
    try:
        return _start()
    except OSError as error:
        raise ResourceError(
            f"the process that decodes JPEG 2000, AVIF and JPEG in TIFF cannot be started: {one_line(error)}; give "
            "the nodes of the crop actors more memory, or raise their limits of processes and open files "
            "(ulimit -u, ulimit -n)"
        ) from error


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(MAX_CPU_SECONDS)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _count(seconds: float) -> None:
    _OURS.seconds = getattr(_OURS, "seconds", 0.0) + seconds


def _read(pipe: IO[bytes], size: int) -> bytearray:
    body = bytearray(size)
    if pipe.readinto(body) < size:  # type: ignore[attr-defined]
        raise EOFError
    return body


def _serve(limit: float) -> None:
    """Answer requests until there are no more."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a decoder may print
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to all processes of a terminal
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            data = bytes(_read(requests, *_LENGTH.unpack(_read(requests, _LENGTH.size))))
            begin = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, limit)
            kind, head, body = _decode(data)
            signal.setitimer(signal.ITIMER_PROF, 0)
            answers.write(_ANSWER.pack(kind, len(head) + len(body), time.process_time() - begin))
            answers.write(head)
            answers.write(body)
            answers.flush()


def _decode(data: bytes) -> tuple[int, bytes, bytes | memoryview]:
    try:
        samples = decode_pillow(open_pillow(data))
    except BadImage as error:
        return _BAD_IMAGE, b"", error.reason.encode()
    except Exception as error:  # any parser may raise any exception
        return _DAMAGED, b"", one_line(error).encode()
    values = np.ascontiguousarray(samples.values)
    head = _SHAPE.pack(*values.shape, samples.num_colours, samples.has_alpha, values.dtype.str.encode())
    return _PIXELS, head, values.data.cast("B")


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
