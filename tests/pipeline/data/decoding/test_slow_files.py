"""Files that may take long are decoded in a process of their own, which is ended after a limit of CPU time."""

import contextlib
import gc
import io
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context

import numpy as np
import psutil
import pytest
from image_files import FILES, MAX_PIXELS, encode, picture
from jobs_processes import wait_until
from PIL import Image

from dinoray.models.errors import ResourceError
from dinoray.pipeline.data.decoding import decoder_process
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.decoding.decoder_process import thread_seconds
from dinoray.pipeline.data.decoding.pillow import decode_pillow

MODULE = decoder_process.__name__
OF_OTHERS: set[int] = set()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """This thread has no process for slow files before a test, nor after it; those of other tests do not count."""
    OF_OTHERS.clear()
    OF_OTHERS.update(process.pid for process in decoders())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_process, "_OURS", threading.local())
        yield
    gc.collect()  # errors that pytest.raises keeps know the process
    wait_until(lambda: not decoders())


@pytest.fixture(scope="session")
def noise() -> bytes:
    """A JPEG 2000 that takes about a second: its coded bits are as many as they can be."""
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    return encode(pixels, "JPEG2000")


def decoders() -> list[psutil.Process]:
    """The processes for slow files of this process."""
    found = []
    for process in psutil.Process().children():
        try:
            is_one = MODULE in process.cmdline() and process.pid not in OF_OTHERS
            found += [process] if is_one else []
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_file_is_refused_after_its_cpu_time_and_the_next_is_decoded(
    noise: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_process, "MAX_CPU_SECONDS", 0.25)
    with pytest.raises(BadImage, match=r"^too slow: not decoded after 0\.25 s of CPU time$"):
        decode(noise, max_pixels=10**7)
    assert decode(FILES["jpeg 2000"], max_pixels=MAX_PIXELS).shape == (40, 56, 3)


def test_the_limit_is_of_one_file_and_not_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    small = encode(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8), "JPEG2000")
    monkeypatch.setattr(decoder_process, "MAX_CPU_SECONDS", 0.3)
    begin, pids = thread_seconds(), set()
    for _ in range(40):
        decode(small, max_pixels=MAX_PIXELS * 100)
        pids |= {process.pid for process in decoders()}
    assert thread_seconds() - begin > 0.6
    assert len(pids) == 1


def test_time_on_the_clock_does_not_count(noise: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that stands still for longer than the limit, as on a machine with much to do, goes on."""
    limit = 3.0
    monkeypatch.setattr(decoder_process, "MAX_CPU_SECONDS", limit)
    pixels: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: pixels.append(decode(noise, max_pixels=10**7)))
    thread.start()
    wait_until(decoders)
    wait_until(lambda: decoders()[0].cpu_times().user > 0.5)
    decoders()[0].suspend()
    begin = time.monotonic()
    wait_until(lambda: time.monotonic() - begin > limit + 0.5)
    decoders()[0].resume()
    thread.join()
    assert pixels[0].shape == (1500, 1500, 3)


@pytest.mark.parametrize("name", ["jpeg 2000", "avif"])
def test_pixels_are_those_of_the_same_decoder_here(name: str) -> None:
    here = decode_pillow(Image.open(io.BytesIO(FILES[name]))).values
    np.testing.assert_array_equal(decode(FILES[name], max_pixels=MAX_PIXELS), here)
    assert decoders()


@pytest.mark.parametrize(("compression", "is_apart"), [("jpeg", True), ("tiff_lzw", False), (None, False)])
def test_a_tiff_is_decoded_apart_only_if_it_holds_a_jpeg(compression: str | None, is_apart: bool) -> None:
    data = encode(picture(), "TIFF", compression=compression)
    np.testing.assert_array_equal(
        decode(data, max_pixels=MAX_PIXELS), decode_pillow(Image.open(io.BytesIO(data))).values
    )
    assert bool(decoders()) == is_apart


def test_what_pillow_says_of_a_damaged_file_is_the_reason() -> None:
    data = FILES["jpeg 2000"]
    damaged = data[: len(data) // 2] + bytes(len(data) // 2 - 2) + b"\xff\xd9"
    with pytest.raises(OSError, match=r"\w") as here:
        decode_pillow(Image.open(io.BytesIO(damaged)))
    with pytest.raises(BadImage) as apart:
        decode(damaged, max_pixels=MAX_PIXELS)
    assert apart.value.reason == f"damaged or cut off JPEG2000: {here.value}"


def end_while_it_decodes(data: bytes, number: signal.Signals, times: int) -> BadImage | np.ndarray:
    """Decode a file in a thread whose decoder gets a signal in the middle of it, `times` times."""
    result: list[BadImage | np.ndarray] = []

    def run() -> None:
        try:
            result.append(decode(data, max_pixels=10**7))
        except BadImage as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(times):
        wait_until(lambda: decoders() and decoders()[0].cpu_times().user > 0.5)
        (process,) = decoders()
        process.send_signal(number)
        wait_until(lambda pid=process.pid: pid not in [one.pid for one in decoders()])
    thread.join()
    return result[0]


def test_a_file_that_crashes_its_decoder_is_a_bad_image(noise: bytes) -> None:
    found = end_while_it_decodes(noise, signal.SIGSEGV, 1)
    assert isinstance(found, BadImage)
    assert found.reason == "crashes its decoder: SIGSEGV"


def test_a_decoder_that_was_killed_once_is_not_the_files_fault(noise: bytes) -> None:
    found = end_while_it_decodes(noise, signal.SIGKILL, 1)
    assert isinstance(found, np.ndarray)


def test_a_file_whose_decoder_is_killed_twice_is_a_bad_image(noise: bytes) -> None:
    found = end_while_it_decodes(noise, signal.SIGKILL, 2)
    assert isinstance(found, BadImage)
    assert found.reason.startswith("twice not decoded: ")
    assert found.reason.endswith("was ended by SIGKILL")


def test_threads_have_processes_of_their_own_which_end_with_them() -> None:
    barrier, seen = threading.Barrier(3), []

    def run() -> None:
        for _ in range(5):
            np.testing.assert_array_equal(decode(FILES["avif"], max_pixels=MAX_PIXELS), expected)
        barrier.wait()
        seen.append(len(decoders()))
        barrier.wait()

    expected = decode_pillow(Image.open(io.BytesIO(FILES["avif"]))).values
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [3, 3, 3]
    wait_until(lambda: not decoders())


def test_a_forked_process_starts_its_own() -> None:
    decode(FILES["avif"], max_pixels=MAX_PIXELS)
    ours = decoders()[0].pid
    with get_context("fork").Pool(1) as pool:
        theirs = pool.apply(_decode_and_find)
    assert theirs != [ours]
    assert len(theirs) == 1
    assert [process.pid for process in decoders()] == [ours]
    decode(FILES["avif"], max_pixels=MAX_PIXELS)


def _decode_and_find() -> list[int]:
    decode(FILES["avif"], max_pixels=MAX_PIXELS)
    return [process.pid for process in decoders()]


def test_the_time_of_its_process_counts_as_the_threads(noise: bytes) -> None:
    begin, here = thread_seconds(), time.thread_time()
    decode(noise, max_pixels=10**7)
    assert thread_seconds() - begin > 5 * (time.thread_time() - here)


def test_a_process_ends_with_the_one_that_started_it() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        decode(FILES["avif"], max_pixels=MAX_PIXELS)
        os.write(writer, str(decoders()[0].pid).encode())
        os._exit(0)  # as a process that is killed: nothing is tidied up
    os.waitpid(pid, 0)
    decoder = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    wait_until(lambda: not psutil.pid_exists(decoder))


@contextlib.contextmanager
def no_more_files() -> Iterator[Callable[[], None]]:
    """This process can open no file and no pipe, until it is left or the function is called."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def end() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield end
    finally:
        end()


def test_a_machine_that_starts_no_process_for_a_while_costs_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            end()

    monkeypatch.setattr(decoder_process.time, "sleep", pause)
    with no_more_files() as end:
        pixels = decode(FILES["avif"], max_pixels=MAX_PIXELS)
    assert pixels.shape == (40, 56, 3)
    assert len(pauses) == 3


def test_a_machine_that_starts_no_process_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "_START_PAUSES", (0.01, 0.01))
    with no_more_files(), pytest.raises(ResourceError, match=r"Too many open files; .* ulimit -n"):
        decode(FILES["avif"], max_pixels=MAX_PIXELS)
    assert decode(FILES["avif"], max_pixels=MAX_PIXELS).shape == (40, 56, 3)
