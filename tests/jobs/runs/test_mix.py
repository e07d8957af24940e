"""A mix of sources in the commands: what is printed of it, which mixes are refused, and how it is written in files."""

import json
from argparse import Namespace
from itertools import takewhile
from pathlib import Path

import pytest
import yaml
from samples import write_all
from sources import IMAGES, as_shard

from dinoray.jobs import doctor, embed, manifest, pack
from dinoray.jobs.cli.arguments import PretrainArguments
from dinoray.jobs.cli.config import differences, load_config
from dinoray.jobs.cli.print_config import describe_config
from dinoray.jobs.cluster.plan_config import PlanArguments, plan_config
from dinoray.jobs.cluster.plan_lines import run_command
from dinoray.jobs.runs.data_lines import data_lines, describe_reading
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.data.manifests.manifest import build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.worker.config import Config
from dinoray.pipeline.worker.inputs import check_mix

MORE = {f"c/{number:03}.jpg": b"x" * 60 for number in range(42)}


@pytest.fixture
def mix(tmp_path: Path) -> str:
    """Of 18 images in a folder, and 42 in Parquet, as a setting."""
    write_all(tmp_path / "photos", {**IMAGES, "notes.txt": b"x"})
    write_all(tmp_path / "web", {"a.parquet": as_shard(MORE)})
    return f"data.mix={{{tmp_path}/photos: 7, {tmp_path}/web: 3}}"


def opened(*settings: str) -> tuple[Config, Source]:
    config = load_config("photos_small", None, ["resources.train_workers=1", *settings])
    return config, Source(config.data, build_manifest(config.data))


def test_shares_and_passes_are_said_and_what_is_ignored_in_each_source(mix: str, tmp_path: Path) -> None:
    config, source = opened(mix)
    first, photos, ignored, web = data_lines(source)
    assert (
        first
        == "mixing: photos 70% (18 images, 2.3 passes an epoch), web 30% (42 images, 0.43 passes an epoch)"
    )
    assert photos.startswith(f"data: 18 images in 2 class folders at {tmp_path}/photos (")
    assert ignored == "ignored in photos: 1 .txt"
    assert web.startswith(f"data: 42 images in 1 Parquet file at {tmp_path}/web (")
    assert describe_reading(source, config, most_actors=2) == []


def test_a_batch_with_an_image_twice_is_refused_and_the_weight_that_is_named_helps(
    mix: str, tmp_path: Path
) -> None:
    batch = "train.global_batch_size=32"
    with pytest.raises(
        ConfigError, match=r"draws 22 images a step from the 18 of .*photos, .* from 7 to 3.8"
    ) as _:
        check_mix(*opened(mix, batch))
    check_mix(*opened(f"data.mix={{{tmp_path}/photos: 3.8, {tmp_path}/web: 3}}", batch))


def test_streams_are_for_mixes_of_objects(mix: str, tmp_path: Path) -> None:
    streams = ["train.global_batch_size=8", "data.streams=2"]
    with pytest.raises(ConfigError, match=r"data\.streams=2 with Parquet .* set data.streams=1"):
        check_mix(*opened(mix, *streams))
    check_mix(*opened(f"data.mix={{{tmp_path}/photos: 1, {tmp_path}/photos/a: 1}}", *streams))


@pytest.mark.parametrize("job", [embed, pack, manifest])
def test_commands_of_one_source_refuse_a_mix(job: object, mix: str) -> None:
    arguments = (["run"] if job is embed else []) + ["photos", "--out=o", mix]
    with pytest.raises(ConfigError, match=r"takes one source.*leave data.mix out, and run .* once for each"):
        job.main(arguments)  # type: ignore[attr-defined]


def test_the_demo_recipe_has_no_images_of_its_own_beside_a_mix(mix: str) -> None:
    config = load_config(None, None, [mix])
    assert config.eval.val_path == "auto"
    assert len(config.data.mix) == 2
    with pytest.raises(ConfigError, match=r"leave out data\.path, or set data\.mix=null"):
        load_config(None, None, [mix, "data.path=photos"])
    assert load_config(None, None, [mix, "data.path=photos", "data.mix=null"]).data.path == "photos"


def test_a_printed_config_and_that_of_a_run_are_read_back(mix: str, tmp_path: Path) -> None:
    config = load_config("photos_small", None, [mix])
    arguments = PretrainArguments().parse_args(["--recipe", "photos_small", mix, "--print-config"])
    for text in (describe_config(Config, arguments), config.to_yaml()):
        (tmp_path / "config.yaml").write_text(text)
        again = load_config(None, tmp_path / "config.yaml", ["recipe=photos_small"])
        assert again.data == config.data
    assert list(yaml.safe_load(config.to_yaml())["data"]["mix"].values()) == [7, 3]
    other = load_config("photos_small", None, [mix.replace("photos: 7", "photos: 6")])
    assert differences(config, other) == [f"data.mix.{tmp_path}/photos: 7.0 -> 6.0"]


def test_a_plan_prints_the_command_with_the_mix(mix: str) -> None:
    settings = [mix, "plan.num_images=1000", "plan.images_per_second_per_gpu=100"]
    arguments: Namespace = PlanArguments().parse_args(["--recipe", "photos_small", *settings])
    config = plan_config(arguments)
    assert f"'{mix}'" in run_command(arguments, config, {"resources.use_gpu": "true"})
    arguments.overrides = settings[1:]
    assert f"'{config.data.address}'" in run_command(arguments, config, {"resources.use_gpu": "true"})


def test_doctor_looks_into_each_source_and_prints_the_command_of_the_mix(tmp_path: Path) -> None:
    for name in ("photos", "web"):
        write_all(tmp_path / name, {f"{i}.jpg": draw_demo_image("stripes", "train", i) for i in range(3)})
    mix = f"data.mix={{{tmp_path}/photos: 7, {tmp_path}/web: 3}}"
    parsed = Namespace(
        recipe=None, config=None, overrides=[mix, "data.streams=1"], address=None, verbose=False
    )
    found = list(takewhile(lambda one: one.name != "storage", doctor._findings(parsed)))
    texts = {name: [one.text for one in found if one.name == name] for name in ("data", "contents", "next")}
    assert [f"{tmp_path}/{name}" in texts["data"][n] for n, name in enumerate(("photos", "web"))] == [
        True,
        True,
    ]
    assert [text.partition(" at ")[0] for text in texts["contents"]] == ["3 images"] * 2
    assert texts["next"] == [f"dinoray pretrain '{mix}' data.streams=1"]
    assert {one.verdict for one in found if one.name in texts} == {"ok"}
    assert json.dumps(texts)
