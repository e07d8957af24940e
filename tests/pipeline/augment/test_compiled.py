"""Compiled code: the numbers of the interpreter, kept once per machine and source, done without where it must be."""

import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from dinoray.pipeline.augment import jit, params, rng
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import Crops, crop_rng, multi_crop
from dinoray.pipeline.augment.params import sample, sample_image

AUGMENT = ROOT / "pipeline" / "augment"
NO_NUMBA = "import sys; sys.modules['numba'] = sys.modules['llvmlite'] = None\n"


def start_python(code: str, **environment: str) -> subprocess.Popen[str]:
    """A fresh interpreter in the repository's root."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> list:
    """What it printed last, as JSON."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def checksum(crops: Crops) -> list[int]:
    return [zlib.crc32(crops.global_crops), zlib.crc32(crops.local_crops)]


# Compiled and interpreted.

SIDES = st.integers(1, 6000) | st.integers(1, 20)


@given(width=SIDES, height=SIDES, seed=st.integers(0, 2**40), key=st.text(max_size=9))
def test_drawing_compiled_and_interpreted_gives_the_same_bits(
    width: int, height: int, seed: int, key: str
) -> None:
    config = CropsConfig(local_crop_scale=(0.001, 0.4), aspect_ratio=((0.3, 2.9), (3 / 4, 4 / 3)))
    table = sample(crop_rng(seed, 0, key), width, height, config).table
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_between", "_draw_box", "_draw"):  # compiled functions call each other by these names
            patch.setattr(params, name, getattr(params, name).py_func)
        interpreted = sample(crop_rng(seed, 0, key), width, height, config).table
    np.testing.assert_array_equal(table.view(np.uint64), interpreted.view(np.uint64))


@given(
    width=SIDES, height=SIDES, seed=st.integers(0, 2**40), epoch=st.integers(0, 900), key=st.text(max_size=9)
)
def test_the_parameters_of_an_image_come_from_the_generator_of_its_key(
    width: int, height: int, seed: int, epoch: int, key: str
) -> None:
    ours = sample_image(seed, epoch, key, width, height, CropsConfig())
    theirs = sample(crop_rng(seed, epoch, key), width, height, CropsConfig())
    np.testing.assert_array_equal(ours.table.view(np.uint64), theirs.table.view(np.uint64))
    assert ours[:2] == theirs[:2] == (width, height)


def test_numbers_of_any_count_are_those_of_numpys_generator() -> None:
    for count in (1, 2, 3, 4, 5, 33, 330):
        rows = np.empty((1, count))
        digest = np.frombuffer(rng.image_digest(5, 6, "key"), "<u8")
        jit.compiled(_filled)(digest[0], digest[1], rows)
        np.testing.assert_array_equal(rows, crop_rng(5, 6, "key").random((1, count)))


def _filled(low: int, high: int, rows: np.ndarray) -> None:
    rng.fill_uniform(low, high, rows)


# Without numba.


@pytest.fixture(scope="module")
def without_numba() -> list:
    """What a process says that cannot import numba."""
    code = NO_NUMBA + (
        "import json, logging, zlib, numpy as np\n"
        "from dinoray.models.errors import ConfigError\n"
        "from dinoray.pipeline.augment.params import sample_image\n"
        "from dinoray.pipeline.augment.multicrop import crop_rng, kernel_name, multi_crop, prepare_kernel\n"
        "from dinoray.pipeline.augment.config import CropsConfig\n"
        "logging.basicConfig(stream=sys.stdout, level='INFO', format='%(message)s')\n"
        "prepare_kernel(CropsConfig())\n"
        "prepare_kernel(CropsConfig(kernel='torch'))\n"
        "image = np.arange(90 * 120 * 3).reshape(90, 120, 3).astype(np.uint8)\n"
        "crops = multi_crop(image, crop_rng(3, 1, 'k'), CropsConfig())\n"
        "try: prepare_kernel(CropsConfig(kernel='numba')); refused = ''\n"
        "except ConfigError as error: refused = str(error)\n"
        "tables = [sample_image(1, 2, str(n), 30 * n + 1, 500, CropsConfig()).table for n in range(100)]\n"
        "print(json.dumps([kernel_name(CropsConfig()), refused, zlib.crc32(np.stack(tables)),\n"
        "    [zlib.crc32(crops.global_crops), zlib.crc32(crops.local_crops)]]))\n"
    )
    output, errors = start_python(code).communicate(timeout=300)
    *log, last = output.splitlines()
    assert last.startswith("["), errors
    return [log, *json.loads(last)]


def test_without_numba_the_torch_kernel_makes_the_crops_and_the_log_says_why(without_numba: list) -> None:
    log, name, _, _, sums = without_numba
    assert name == "torch"
    assert len(log) == 2
    assert log[0].startswith("crops are made by the torch kernel: no numba (")
    assert "numba" in log[0].split("(")[1]
    assert log[1] == "crops are made by the torch kernel"
    image = np.arange(90 * 120 * 3).reshape(90, 120, 3).astype(np.uint8)
    assert sums == checksum(multi_crop(image, crop_rng(3, 1, "k"), CropsConfig(kernel="torch")))


def test_without_numba_the_same_parameters_are_drawn(without_numba: list) -> None:
    tables = [sample_image(1, 2, str(n), 30 * n + 1, 500, CropsConfig()).table for n in range(100)]
    assert without_numba[3] == zlib.crc32(np.stack(tables))


def test_asking_for_a_numba_that_is_not_there_is_a_config_error(without_numba: list) -> None:
    assert re.fullmatch(
        r"crops.kernel=numba, but numba cannot be used \(.*numba.*\); install it, or set crops.kernel=torch",
        without_numba[2],
    )


# What is kept on disk.


def test_processes_that_start_together_compile_once_between_them(tmp_path: Path) -> None:
    code = (
        "import json; from dinoray.pipeline.augment import multicrop as crops\n"
        "from dinoray.pipeline.augment.config import CropsConfig\n"
        "from dinoray.pipeline.augment.kernels import numba_crops as crop_kernel\n"
        "crops.prepare_kernel(CropsConfig())\n"
        "stats = crop_kernel.crop_all.stats\n"
        "print(json.dumps([sum(stats.cache_misses.values()), sum(stats.cache_hits.values())]))\n"
    )
    processes = [start_python(code, DINORAY_CACHE=str(tmp_path / "cache")) for _ in range(2)]
    assert sorted(answer(process) for process in processes) == [[0, 1], [1, 0]]
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("kernels-")
    assert list(folder.glob("**/*crop_all*.nbc"))
    assert len(list(folder.glob("**/*crop_all*.nbc"))) == 1


def test_the_cache_folder_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINORAY_CACHE", str(tmp_path / "here"))
    assert jit._kernel_folder().parent == tmp_path / "here"
    assert jit._kernel_folder().is_dir()
    monkeypatch.delenv("DINORAY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert jit._kernel_folder().parent == tmp_path / "there" / "dinoray"


def unusable_folder(tmp_path: Path, kind: str) -> Path:
    """A folder that nothing can be written to."""
    if kind == "below a file":
        (tmp_path / "file").write_text("")
        return tmp_path / "file" / "cache"
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root")
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o500)
    return folder


@pytest.mark.parametrize("kind", ["below a file", "read-only"])
def test_where_the_cache_cannot_be_written_the_temporary_folder_serves(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(jit.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("DINORAY_CACHE", str(unusable_folder(tmp_path, kind)))
    folder = jit._kernel_folder()
    assert folder.parents[1] == tmp_path / "temporary"
    (folder / "a").write_text("can be written")


@pytest.mark.parametrize("source", jit._SOURCES)
def test_a_changed_source_has_another_folder(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINORAY_CACHE", str(tmp_path / "cache"))
    for name in jit._SOURCES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((AUGMENT / name).read_bytes())
    before = jit._kernel_folder()
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "jit.py"))
    assert jit._kernel_folder() == before
    with open(tmp_path / source, "a") as file:
        file.write("# changed\n")
    assert jit._kernel_folder() != before


def test_every_source_of_machine_code_is_among_those_that_name_the_folder() -> None:
    compiled_sources = {
        os.path.relpath(path, AUGMENT)
        for path in (ROOT / "pipeline").rglob("*.py")
        if re.search(r"^@(compiled|njit_cached|intrinsic)\b", path.read_text(), re.MULTILINE)
    }
    assert len(compiled_sources) >= 4
    of_constants = {"stains.py"}  # its numbers are in the machine code
    assert compiled_sources | of_constants | {"jit.py"} == set(jit._SOURCES)


def test_preparing_compiles_all_that_the_stream_calls() -> None:
    code = (
        "from dinoray.pipeline.augment import params; from dinoray.pipeline.augment.kernels import numba_crops;"
        "from dinoray.pipeline.augment.multicrop import prepare_kernel;"
        "from dinoray.pipeline.augment.config import CropsConfig; prepare_kernel(CropsConfig());"
        "functions = [params._draw_from, params.measure, params.first_outside, numba_crops.crop_all];"
        "print([len(function.signatures) for function in functions])"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1, 1, 1, 1]"
