"""A process imports what it uses: each entry point in a process of its own."""

import json

from fresh_python import run_python

from dinoray.jobs.__main__ import ORDER

NETWORKS = {"torch", "torchvision", "timm"}


def loaded(code: str) -> set[str]:
    """The top-level packages that are loaded after `code`."""
    names = run_python(f"{code}; import json, sys; print(json.dumps(sorted(sys.modules)))")
    return {name.partition(".")[0] for name in json.loads(names)}


ENTRY_POINTS = [
    "dinoray.pipeline.stream.ray_data",  # the augment actors
    "dinoray.pipeline.stream.shared_stream",
    "dinoray.pipeline.cluster.channel",
    "dinoray.pipeline.evaluation.actors",  # packing, and embedding before a network comes
    "dinoray.pipeline.augment.augmenter",
    "dinoray.jobs.cli.config",  # every setting
    *(f"dinoray.jobs.{command}" for command in ORDER),  # --help, and what is wrong on the command line
]


def test_processes_without_a_network_import_no_library_of_networks() -> None:
    """One process imports them all, one after the other: what it has not imported then, none of them imports."""
    code = (
        f"import importlib, json, sys\nfound = {{}}\nfor name in {ENTRY_POINTS}:\n"
        f"    importlib.import_module(name)\n    found[name] = sorted({NETWORKS} & set(sys.modules))\n"
        "print(json.dumps(found))"
    )
    assert json.loads(run_python(code)) == {name: [] for name in ENTRY_POINTS}


def test_an_actor_makes_crops_without_torch() -> None:
    code = (
        "from dinoray.pipeline.augment import multicrop as crops;"
        "from dinoray.pipeline.augment.config import CropsConfig;"
        "crops.limit_threads(); crops.prepare_kernel(CropsConfig(kernel='numba'))"
    )
    assert loaded(code) & NETWORKS == set()


def test_the_torch_kernel_imports_torch_and_takes_one_thread() -> None:
    code = (
        "from dinoray.pipeline.augment import multicrop as crops;"
        "from dinoray.pipeline.augment.config import CropsConfig;"
        "crops.limit_threads(); crops.prepare_kernel(CropsConfig(kernel='torch'));"
        "import numpy as np; crops.multi_crop(np.zeros((32, 32, 3), np.uint8), crops.crop_rng(0, 0, ''), "
        "CropsConfig(kernel='torch')); import sys; print(sys.modules['torch'].get_num_threads())"
    )
    assert run_python(code, OMP_NUM_THREADS="2").split() == ["1"]
