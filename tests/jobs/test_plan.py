"""`python -m jobs.plan`: figures given and measured, what it says, cluster.yaml filled in, what it refuses."""

import importlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cluster_checks import LINTS, ec2_complaints, ray_checks
from forecast_inputs import FIGURES, RUN
from jobs_processes import TINY, run_job
from paths import ROOT
from ray_head import ray_head
from ray_releases import uses_private_ray
from tiny_run import write_images

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cluster.cluster_file import fill_in
from dinoray.jobs.cluster.measure import forwards_per_image
from dinoray.jobs.cluster.plan_config import PlanArguments, PlanConfig, plan_config
from dinoray.jobs.cluster.plan_lines import settings_of
from dinoray.models.errors import ConfigError, DataError, ResourceError
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.planning.forecast import Forecast, forecast

GIVEN = [
    "plan.num_images=20000000",
    "plan.bytes_per_image=110000",
    "plan.latency_ms=25",
    "plan.images_per_second_per_cpu=250",
    "plan.images_per_second_per_gpu=800",
]
VIT_S = ["--recipe", "vit_small_imagenet_vanilla", "head.out_dim=64"]
VIT_S += [
    "backbone.kwargs={depth: 1, embed_dim: 64, num_heads: 1}"
]  # built in no time; its crops are the published


def plan(*arguments: str) -> None:
    importlib.import_module("jobs.plan").main(arguments)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    plan(*arguments, "--json")
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


# Figures that are given


def test_where_all_figures_are_given_no_images_are_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    facts = planned(capsys, *VIT_S, *GIVEN)
    assert (facts["num_images"], facts["figures"]["images_per_request"]) == (20_000_000, 1)
    found = facts["plan"]
    assert found["images_per_second"] == 8 * 800  # the recipe's train workers
    assert found["training_seconds"] == pytest.approx(100 * 20_000_000 / 6400, rel=1e-5)
    assert found["gpu_nodes"] == 2
    assert found["total_dollars"] == pytest.approx(sum(found["dollars"].values()))
    assert found["dollars"]["gpu"] == pytest.approx(found["hours"] * 2 * 10.49264)
    assert [other["train_workers"] for other in facts["other_sizes"]] == [1, 2, 4, 8, 16]
    assert facts["other_sizes"][3] == found


def test_the_command_it_prints_is_a_config_with_the_plan_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    facts = planned(capsys, *VIT_S, *GIVEN, "optim.base_lr=1e-3", "resources.train_workers=4", "name=mine")
    words = shlex.split(facts["command"])
    assert words[:6] == ["dinoray", "submit", "--", "dinoray", "pretrain", "--recipe"]
    config = load_config(words[6], None, words[7:])
    assert (config.recipe, config.name, config.optim.base_lr) == ("vit_small_imagenet_vanilla", "mine", 1e-3)
    assert (config.resources.train_workers, config.resources.use_gpu) == (4, True)
    assert list(config.resources.augment_actors) == facts["plan"]["augment_actors"]
    assert (config.cost.gpu_hourly, config.cost.head_hourly) == (pytest.approx(10.4926), 0.4746)
    assert config.cost.cpu_hourly == pytest.approx(1.6128 * 0.45, abs=1e-4)
    assert (config.data.path, config.storage_path) == ("s3://BUCKET/images", "s3://BUCKET/runs")


def test_the_command_it_prints_names_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    for given, name in (([], "vit_small_imagenet_vanilla"), (["name=mine"], "mine")):
        words = shlex.split(planned(capsys, *VIT_S, *GIVEN, *given)["command"])
        assert [word for word in words if word.startswith("name=")] == [f"name={name}"]


def test_prices_in_a_file_are_for_the_plan_and_its_other_settings_for_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    settings = {"train": {"epochs": 50}, "data": {"path": "s3://mine/images"}, "eval": {"k": [5, 10]}}
    settings["storage_path"] = "s3://mine/runs"
    file.write_text(yaml.dump(settings))
    assert f"--config {file}" in planned(capsys, *VIT_S, *GIVEN, "--config", str(file))["command"]
    file.write_text(yaml.dump({**settings, "plan": {"prices": {"g6e.12xlarge": {"hourly": 9}}}}))
    facts = planned(capsys, *VIT_S, *GIVEN, "--config", str(file))
    config = load_config(None, None, shlex.split(facts["command"])[7:])
    assert (config.train.epochs, config.eval.k, config.data.path) == (50, (5, 10), "s3://mine/images")
    assert config.storage_path == "s3://mine/runs"
    assert config.cost.gpu_hourly == 9
    assert facts["plan"]["dollars"]["gpu"] == pytest.approx(facts["plan"]["hours"] * 2 * 9)


def test_settings_of_the_plan_in_one_mapping_are_not_handed_on(capsys: pytest.CaptureFixture[str]) -> None:
    given = ", ".join(word.removeprefix("plan.").replace("=", ": ") for word in GIVEN)
    facts = planned(capsys, *VIT_S, f"plan={{{given}}}")
    load_config(None, None, shlex.split(facts["command"])[7:])


def test_a_number_of_gpus_that_no_node_has_the_cpus_for_is_left_out_of_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = ["resources.train_workers=1", "resources.cpus_per_train_worker=16"]
    sizes = [other["train_workers"] for other in planned(capsys, *VIT_S, *GIVEN, *alone)["other_sizes"]]
    assert sizes[:2] == [1, 2]
    assert 4 not in sizes


def test_a_person_reads_nodes_network_time_dollars_bottleneck_and_other_sizes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan(*VIT_S, *GIVEN, "plan.gpu_node=g5.xlarge")
    said = capsys.readouterr().out
    assert "8 x g5.xlarge" in said
    assert "would be the limit" in said or "would be no limit" in said
    assert re.search(r"^bottleneck +network: take a plan.gpu_node whose link", said, flags=re.MULTILINE)
    assert re.search(r"^cost +\$[\d,]+: GPU nodes \$", said, flags=re.MULTILINE)
    assert "list prices of us-east-1" in said
    assert re.search(r"^storage +[\d,]+ requests/s, \d+ MB/s", said, flags=re.MULTILINE)
    assert re.search(r"^ +16 +16 .* network$", said, flags=re.MULTILINE)


def test_more_requests_than_a_prefix_serves_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    plan(*VIT_S, *GIVEN)
    assert (
        "storage       6,400 requests/s, 704 MB/s; S3 documents 5,500 requests/s per prefix"
        in capsys.readouterr().out
    )
    plan(*VIT_S, *GIVEN, "plan.images_per_request=100")
    assert "storage       64 requests/s, 704 MB/s\n" in capsys.readouterr().out


def test_a_better_type_of_cpu_node_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    # One CPU is left on the GPU node: its crops come from nodes whose link holds them.
    figures = ["plan.images_per_second_per_gpu=3000", "resources.cpus_per_train_worker=11"]
    plan(*VIT_S, *GIVEN[:4], *figures, "resources.train_workers=4")
    said = capsys.readouterr().out
    assert "limited by network" in said
    assert re.search(r"plan\.cpu_node=c6in\.\w+ would take \d+ nodes and cost \$[\d,]+ less", said)


def test_streams_are_set_where_the_gpus_need_more_than_one_execution_brings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fast = [*VIT_S, *GIVEN[:4], "plan.images_per_second_per_gpu=1500"]
    plan(*fast)
    said = capsys.readouterr().out
    assert (
        "12,000 images/s; with free data it would be 12,000; one execution of Ray Data brings 7,000" in said
    )
    assert "set data.streams=2" in said
    for given, streams in (([], 2), (["data.streams=4"], 4), (["plan.images_per_second_per_gpu=800"], 1)):
        config = load_config(None, None, shlex.split(planned(capsys, *fast, *given)["command"])[7:])
        assert config.data.streams == streams
    plan(*VIT_S, *GIVEN)
    assert "data.streams" not in capsys.readouterr().out


# cluster.yaml


def filled(tmp_path: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    out = tmp_path / "mine.yaml"
    plan(*VIT_S, *GIVEN, *arguments, "--out", str(out))
    return out.read_text(), yaml.safe_load(out.read_text())


CHANGED = ["plan.gpu_node=g6.48xlarge", "plan.cpu_node=c6in.4xlarge", "plan.head_node=m6id.xlarge"]
CHANGED += ["plan.availability_zone=eu-west-1b", "resources.cpus_per_train_worker=23"]


@uses_private_ray
def test_the_cluster_that_it_fills_in_passes_all_that_the_projects_own_does(tmp_path: Path) -> None:
    text, tree = filled(tmp_path, *CHANGED)
    ray_checks(json.loads(json.dumps(tree)))
    assert ec2_complaints(json.loads(json.dumps(tree))) == []
    assert {lint.__name__: lint(tree) for lint, _ in LINTS if lint(tree)} == {}
    assert "123456789012" in text  # what only its owner knows


def test_it_names_the_plans_nodes_and_zone_and_keeps_every_comment(tmp_path: Path) -> None:
    text, tree = filled(tmp_path, *CHANGED)
    types = tree["available_node_types"]
    assert [types[name]["node_config"]["InstanceType"] for name in ("head", "augment", "train")] == [
        "m6id.xlarge",
        "c6in.4xlarge",
        "g6.48xlarge",
    ]
    assert types["train"]["max_workers"] == 1
    assert types["augment"]["max_workers"] >= 1
    assert tree["max_workers"] == 1 + types["augment"]["max_workers"]
    assert (tree["provider"]["region"], tree["provider"]["availability_zone"]) == ("eu-west-1", "eu-west-1b")
    old, new = (ROOT / "cluster.yaml").read_text().splitlines(), text.splitlines()
    assert len(old) == len(new)
    changed = [line for line, other in zip(old, new, strict=True) if line != other]
    assert all(re.search(r"max_workers|InstanceType|region:|zone:", line) for line in changed)
    assert all("# EDIT" in b for a, b in zip(old, new, strict=True) if "# EDIT" in a)


def forecast_of(config: PlanConfig) -> Forecast:
    return forecast(RUN, FIGURES, config.plan)


def test_a_file_that_lacks_a_line_is_refused_rather_than_half_filled() -> None:
    config = plan_config(PlanArguments().parse_args([*VIT_S, *GIVEN]))
    text = (ROOT / "cluster.yaml").read_text()
    found = forecast_of(config)
    assert fill_in(text, config.plan, found) != text
    for broken, says in (
        (text.replace("  augment:", "  other:"), "no node type augment"),
        (text.replace("max_workers: 10  #", "max_worker: 10  #"), "0 lines like"),
        (text.replace("      InstanceType: c6id.8xlarge", "      Type: c6id.8xlarge"), "augment has 0 lines"),
    ):
        with pytest.raises(ConfigError, match=says):
            fill_in(broken, config.plan, found)


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("precious")
    with pytest.raises(ConfigError, match="already exists"):
        plan(*VIT_S, *GIVEN, "--out", str(out))
    assert out.read_text() == "precious"


# What is refused


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["plan.gpu_node=c6id.8xlarge"], r"plan.gpu_node=c6id.8xlarge has no GPU; take g6.xlarge"),
        (["plan.cpu_node=g5.xlarge"], r"plan.cpu_node=g5.xlarge has GPUs, .*; take m6id.xlarge"),
        (["plan.head_node=t2.nano"], r"plan.head_node=t2.nano is not in plan.prices .*plan.prices={t2.nano"),
        (
            ["plan.prices={t2.nano: {hourly: 1}}"],
            r"plan.prices: t2.nano is new and lacks cpus, gbit, memory_gib; add them",
        ),
        (
            ["plan.availability_zone=us-east-1"],
            r"plan.availability_zone=us-east-1 must be a region and a letter",
        ),
        (["plan.spot_share=0"], r"plan.spot_share=0: must be greater than 0"),
        (["plan.num_image=3"], r"plan.num_image=3: unknown key; did you mean plan.num_images"),
        (["resources.train_workers=7"], r"train.global_batch_size=512 must be divisible by"),
        (["resources.cpus_per_train_worker=13"], r"cpus_per_train_worker=13 for each of 4 GPUs"),
        (["resources.use_gpu=false"], r"plan.images_per_second_per_gpu=800 is for GPUs"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_cannot_be_is_one_line_with_name_value_rule_and_remedy(settings: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(*VIT_S, *GIVEN, *settings)


def test_images_that_cannot_be_read_are_asked_for_with_the_figures_that_stand_for_them(
    tmp_path: Path,
) -> None:
    given = [figure for figure in GIVEN if "latency_ms" not in figure]
    with pytest.raises(
        DataError, match=r"nowhere.*; or also set plan\.latency_ms, so that no images need to be read$"
    ):
        plan(*VIT_S, *given, f"data.path={tmp_path / 'nowhere'}")
    with pytest.raises(DataError) as none_given:
        plan(*VIT_S, GIVEN[-1], f"data.path={tmp_path / 'nowhere'}")
    assert "plan." not in str(none_given.value)


def test_a_figure_of_the_images_that_is_missing_asks_for_the_images() -> None:
    for missing in range(4):
        name = GIVEN[missing].partition("=")[0]
        with pytest.raises(ConfigError, match=f"data.path: must be set, or else set {name} too"):
            plan(*VIT_S, *[figure for i, figure in enumerate(GIVEN) if i != missing])
    with pytest.raises(ConfigError, match=r"data.path: must be set, e.g."):
        plan(*VIT_S)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here to measure on")
def test_what_a_gpu_trains_on_is_not_guessed_from_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(
        ResourceError, match="this machine has no GPU to measure it; set it, or measure on a GPU node"
    ):
        plan(*VIT_S, *GIVEN[:4], "resources.use_gpu=true")
    with pytest.raises(
        ConfigError, match=r"--out .* is for a cluster, but this plan is for the CPUs of this machine"
    ):
        plan(*VIT_S, *GIVEN[:4], "--out", str(tmp_path / "mine.yaml"))


def test_a_job_on_a_cluster_plans_no_run_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # where nothing is
    with pytest.raises(ConfigError, match="this is a job on a cluster"):
        plan(*VIT_S, *GIVEN[:4], "resources.use_gpu=false")


# Figures that are measured


def test_a_step_counts_its_forwards() -> None:
    # The teacher's two, and three for each of the student's: two, and eight of (96 / 224) ** 2.
    assert forwards_per_image(CropsConfig()) == pytest.approx(2 + 3 * (2 + 8 * 9 / 49))


def test_what_is_measured_here_makes_a_plan_whose_numbers_fit_one_another(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "train", labels=("rings", "dots"), per_label=8)
    settings = [*TINY, f"data.path={images}", "eval.val_path=null", "train.epochs=10", "plan.seconds=0.2"]
    code = [*settings, "resources.use_gpu=false"]
    lines = run_job("jobs.plan", "--json", *code, cwd=tmp_path).splitlines()
    facts = json.loads(next(line for line in lines if line.startswith("{")))
    figures, found = facts["figures"], facts["plan"]
    sizes = [file.stat().st_size for file in images.rglob("*.jpg")]
    assert (facts["num_images"], figures["bytes_per_image"]) == (16, pytest.approx(sum(sizes) / 16))
    assert facts["sources"]["num_images"] == "listed"
    assert facts["sources"]["images_per_second_per_gpu"].startswith("measured on one CPU: ")
    crop, step = (1 / figures[f"images_per_second_per_{unit}"] for unit in ("cpu", "gpu"))
    # All cores do both, but no more crops are made than by the one actor.
    expected = min(0.75 * (os.cpu_count() or 1) / (crop + step), 0.92 / crop)
    assert found["images_per_second"] == pytest.approx(expected)
    # Ten epochs of two steps of 8 images.
    assert found["training_seconds"] == pytest.approx(160 / found["images_per_second"])
    assert (found["dollars"], found["gpu_nodes"], found["cpu_nodes"]) == ({}, 0, 0)
    assert not list(tmp_path.glob("runs*"))  # a plan leaves nothing behind


def test_a_planned_price_is_what_the_run_counts() -> None:
    config = plan_config(PlanArguments().parse_args([*VIT_S, *GIVEN, "plan.spot_share=1"]))
    assert settings_of(config, forecast_of(config))["cost.cpu_hourly"] == "1.6128"


@pytest.mark.ray
def test_on_a_cluster_its_nodes_are_measured(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "train", labels=("rings", "dots"), per_label=8)
    given = [*TINY, f"data.path={images}", "plan.seconds=0.2", GIVEN[4], "resources.train_workers=4"]
    with ray_head() as head:
        said = run_job("jobs.plan", *given, env={"RAY_ADDRESS": head.gcs})
    assert re.search(
        r"^crops +[\d,]+ images/s per CPU \(measured on 4 CPUs with [\d,]+ images", said, re.MULTILINE
    )
    assert "1 x g6e.12xlarge" in said
    assert f"data.path={images}" in said.splitlines()[-1]
