"""What a plan prints of the step: whether it fits a GPU, the setting with which it does, and how it scales."""

import importlib
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dinoray.jobs.cluster.plan_config import PlanArguments, PlanConfig, plan_config
from dinoray.jobs.cluster.step_lines import memory_rows

GIVEN = ["plan.num_images=1000000", "plan.bytes_per_image=110000", "plan.latency_ms=25"]
GIVEN += ["plan.images_per_second_per_cpu=250", "plan.images_per_second_per_gpu=800"]
VIT_S = ["--recipe", "vit_small_imagenet_vanilla"]
SMALL = (
    "backbone.kwargs={depth: 1, embed_dim: 64, num_heads: 1}"  # built in no time; its crops are the published
)
L4, L40S = "plan.gpu_node=g6.12xlarge", "plan.gpu_node=g6e.12xlarge"


def config_of(*settings: str) -> PlanConfig:
    return plan_config(PlanArguments().parse_args([*VIT_S, *GIVEN, *settings]))


def rows(*settings: str) -> list[str]:
    config = config_of(*settings)
    run = SimpleNamespace(train_workers=config.resources.most_workers)
    measured = SimpleNamespace(num_images=1_000_000)
    return [text for _, text in memory_rows(config, cast(Any, run), cast(Any, measured))]


def test_a_step_that_fits_is_a_line_without_a_warning() -> None:
    (line,) = rows(L40S)
    assert line.startswith(
        "a step needs 9.1 GB of a GPU's 48.0 GB (held 0.9, activations 7.7, logits 0.5), computed"
    )


LARGE, GIANT = "backbone.name=vit_large_patch16_224", "backbone.name=vit_giant_patch14_224"
FEW = ["resources.train_workers=8", "train.global_batch_size=32"]
TOO_LARGE = {
    "microbatches": (["resources.train_workers=1"], {"accumulate_steps"}),
    "recomputed": (
        [LARGE, *FEW, "plan.prices={g6.12xlarge: {gpu_memory_gib: 9}}"],
        {"activation_checkpointing"},
    ),
    "large batch": (
        [LARGE, "resources.train_workers=2", "train.global_batch_size=1024"],
        {"accumulate_steps"},
    ),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_following_the_advice_on_memory_ends_the_warning(name: str) -> None:
    settings, changed = TOO_LARGE[name]
    line, warning = rows(L4, *settings)
    head, _, advice = warning.partition("; set ")
    assert head == "warning: more than 90% of g6.12xlarge's"
    assert {word.split("=")[0] for word in advice.split()} == {f"train.{key}" for key in changed}
    (after,) = rows(L4, *settings, *advice.split())
    assert after != line


def test_where_no_setting_helps_a_larger_gpu_does() -> None:
    _, warning = rows(L4, GIANT, *FEW)
    assert warning.endswith("; take a plan.gpu_node whose GPUs have more memory, or a smaller backbone")
    assert len(rows("plan.gpu_node=p5.48xlarge", GIANT, *FEW)) == 1


def test_of_a_gpu_of_unknown_memory_and_of_other_networks_no_verdict_is_given() -> None:
    unknown = "plan.prices={x: {hourly: 1, cpus: 48, gpus: 4, gbit: 100, memory_gib: 384}}"
    (line,) = rows(unknown, "plan.gpu_node=x", "resources.train_workers=1")
    assert " of a GPU's (held " in line
    assert rows("backbone.name=resnet50") == []


def test_the_plan_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    plan = importlib.import_module("jobs.plan").main
    settings = [
        *VIT_S,
        *GIVEN,
        SMALL,
        "head.out_dim=64",
        "plan.prices={g6.12xlarge: {gpu_memory_gib: 0.5}}",
        L4,
    ]
    plan(settings)
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert " GB of a GPU's 0.5 GB (" in lines["memory"]
    assert "64 images a GPU and step" in lines["scaling"]
    plan([*settings, "--json"])
    found = json.loads(capsys.readouterr().out)["scaling"]
    assert [one["gpus"] for one in found] == [8, 64, 256]
    assert all(f"{one['efficiency']:.0%} on {one['gpus']}" in lines["scaling"] for one in found)
