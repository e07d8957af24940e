"""The embedding job in real processes: killed and continued, on S3, on forbidden and on bad images."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import fault_proxy
from jobs_processes import run_job, start_job
from samples import parquet, put_all
from servers import S3Server, aws_environment
from tiny_run import NAME, STEP, write_images, write_run

from dinoray.jobs import embed as job
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.decoding.decode import decode, eval_crop
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.features import embed
from dinoray.pipeline.training.checkpoint import read_frozen

LABELS = ("blobs", "dots", "rings", "stripes")
PER_LABEL = 30
BAD = {"dots": 3, "rings": 7}
"""One unreadable image of each of two classes."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, and `images`, two of which are unreadable."""
    world = tmp_path_factory.mktemp("embed")
    images = write_images(world / "images", "train", labels=LABELS, per_label=PER_LABEL)
    for label, i in BAD.items():
        (images / label / f"{i:02d}.jpg").write_bytes(b"<html>no picture</html>")
    write_run(world / "run", f"data.path={images}")
    return world


def arguments(world: Path, out: str | Path, *more: str) -> list[str]:
    """One part per image, so that there is something between the first and the last."""
    return [
        str(world / "run"),
        str(world / "images"),
        f"--out={out}",
        "--rows-per-file=1",
        "--dtype=float32",
        "data.label_from_parent=true",
        "data.max_bad_fraction=0.05",
        "resources.augment_actors=1",
        *more,
    ]


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def table(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(part).replace_schema_metadata() for part in parts(out)])


def vectors(found: pa.Table) -> np.ndarray:
    return np.stack(found["vector"].to_numpy())


def vectors_by_hand(run: Path, source: Source) -> dict[str, np.ndarray]:
    """Of each readable image, from the checkpoint's own backbone, one image at a time."""
    network = read_frozen(run / "checkpoints" / NAME)
    backbone, found = network.backbone(), {}
    for fetched in source.fetch(range(source.num_images)):
        if fetched.data is not None and not fetched.data.startswith(b"<html>"):
            crop = eval_crop(decode(fetched.data, max_pixels=10**6), size=32)
            found[fetched.key] = embed(backbone, crop[None], network.config.crops, precision="fp32")[0]
    return found


@pytest.fixture(scope="module")
def reference(world: Path, run_here: Callable[..., str]) -> Path:
    """Where a job that nothing interrupted wrote."""
    output = run_here("jobs.embed", *arguments(world, world / "reference"))
    assert "120 images in = 118 vectors out + 2 quarantined" in output
    return world / "reference"


@pytest.mark.ray
def test_every_readable_image_has_its_vector_and_every_other_its_reason(world: Path, reference: Path) -> None:
    found = table(reference)
    config = DataConfig(path=str(world / "images"), label_from_parent=True)
    expected = vectors_by_hand(world / "run", Source(config, build_manifest(config)))
    assert found["key"].to_pylist() == list(expected)  # in the manifest's order
    assert found["label"].to_pylist() == [key.split("/")[0] for key in expected]
    np.testing.assert_array_equal(vectors(found), np.stack(list(expected.values())))
    lines = [json.loads(line) for line in (reference / "_about/quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(f"{k}/{i:02d}.jpg" for k, i in BAD.items())
    assert all("not an image" in line["reason"] for line in lines)
    about = json.loads((reference / "_about/embed.json").read_text())
    assert (about["step"], about["which"], about["dtype"]) == (STEP, "teacher", "float32")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.nightly  # beside the same of pack, whose parts are written by the same code
def test_a_job_that_is_killed_continues_without_redoing_a_part(
    world: Path, reference: Path, run_here: Callable[..., str]
) -> None:
    out = world / "killed"
    with start_job("jobs.embed", *arguments(world, out)) as running:
        running.wait_until(lambda: len(parts(out)) >= 5)
        running.kill_driver()
    committed = {part: (part.stat().st_mtime_ns, part.read_bytes()) for part in parts(out)}
    assert 5 <= len(committed) < 120, "killed too late to prove anything"
    assert not (out / "_about/summary.json").exists()

    output = run_here("jobs.embed", *arguments(world, out))

    assert f"{120 - len(committed)} of 120 to do" in output
    assert "120 images in = 118 vectors out + 2 quarantined" in output
    assert committed == {part: (part.stat().st_mtime_ns, part.read_bytes()) for part in committed}
    assert table(out).equals(table(reference))
    assert (out / "_about/quarantine.jsonl").read_bytes() == (
        reference / "_about/quarantine.jsonl"
    ).read_bytes()


@pytest.mark.ray
def test_a_finished_job_says_so_and_does_nothing(
    world: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in reference.iterdir()}
    job.main(arguments(world, reference))
    assert "is finished: 120 images in = 118 vectors out" in " ".join(capsys.readouterr().out.split())
    assert before == {file: file.stat().st_mtime_ns for file in reference.iterdir()}


@pytest.mark.ray
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dtype=float16"], "dtype='float32', not 'float16'"),
        (["--image-size=48"], "image_size=32, not 48"),
        (["--which=student"], "which='teacher', not 'student'"),
        (["--rows-per-file=2"], "rows_per_file=1, not 2"),
        (["--patch-tokens"], "num_patches=0, not 16"),
        (["data.label_from_parent=false"], "data.label_from_parent=True, not False"),
        (["data.path=ELSEWHERE"], "data.path="),
    ],
)
def test_other_settings_are_refused_with_what_differs(
    more: list[str], words: str, world: Path, reference: Path
) -> None:
    more = [argument.replace("ELSEWHERE", str(world / "images" / "dots")) for argument in more]
    with pytest.raises(ConfigError, match=r"holds vectors made with .*set it back") as caught:
        job.main(arguments(world, reference, *more))
    assert words in str(caught.value)


@pytest.mark.ray
def test_another_network_is_refused(world: Path, reference: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other", f"data.path={world / 'images'}", "train.seed=1")
    with pytest.raises(ConfigError, match=r"made with weights="):
        job.main([str(tmp_path / "other"), *arguments(world, reference)[1:]])


@pytest.mark.ray
@pytest.mark.nightly  # the job of pack, which is the same, ends so too
def test_more_bad_images_than_allowed_end_the_job(
    world: Path, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    strict = arguments(world, tmp_path / "out", "data.max_bad_fraction=0.01", "--rows-per-file=10")
    output = run_here("jobs.embed", *strict, code=3)
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith("error: ")
    assert "2 of 120 images could not be used, more than data.max_bad_fraction=0.01" in last
    assert len((tmp_path / "out" / "_about/quarantine.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "out" / "_about/summary.json").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["crops.global_crop_size=48"], r"only data\.\*, storage\.\*, resources\.\* can be set here"),
        (["--image-size=33"], "cannot take images of 33 px"),
        (["--image-size=0"], "invalid positive number"),
        (["--rows-per-file=100000000"], "--rows-per-file 100000000 makes parts of"),
        (["data.pth=x"], r"did you mean data\.path"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    more: list[str], words: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        job.main(arguments(world, tmp_path / "out", *more))
    assert not (tmp_path / "out" / "_about/embed.json").exists()


# S3


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.nightly  # pack, whose job is the same, goes from S3 to S3 too
def test_parquet_on_s3_becomes_vectors_on_s3(
    world: Path, s3: S3Server, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    s3.client().create_bucket(Bucket="embed")
    drawings = {f"{label} {i}": draw_demo_image(label, "val", i) for label in LABELS for i in range(6)}
    names = list(drawings)
    shards = {
        f"data/{s}.parquet": parquet(
            {"image": [drawings[n] for n in some], "name": some, "kind": [n.split()[0] for n in some]}
        )
        for s, some in enumerate((names[:12], names[12:]))
    }
    put_all(s3, "embed", shards)
    command = [
        str(world / "run" / "checkpoints" / NAME),
        "s3://embed/data",
        "--out=s3://embed/vectors",
        "--rows-per-file=5",
        "data.key_column=name",
        "data.label_column=kind",
    ]
    output = run_here("jobs.embed", *command)
    assert "24 images in = 24 vectors out + 0 quarantined" in output
    for name in ("_about/embed.json", *(f"part-{p:05d}.parquet" for p in range(5))):
        body = s3.client().get_object(Bucket="embed", Key=f"vectors/{name}")["Body"].read()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(body)
    found = table(tmp_path)
    assert found["key"].to_pylist() == names
    assert found["label"].to_pylist() == [name.split()[0] for name in names]
    assert found.schema.field("vector").type.value_type == pa.float16()
    network = read_frozen(world / "run" / "checkpoints" / NAME)
    crops = np.stack([eval_crop(decode(x, max_pixels=10**6), size=32) for x in drawings.values()])
    expected = embed(network.backbone(), crops, network.config.crops, precision="fp32")
    np.testing.assert_allclose(vectors(found).astype(np.float32), expected, rtol=2e-3, atol=1e-3)

    # A part that is gone is made again, and no other.
    def written() -> dict[str, object]:
        listed = s3.client().list_objects_v2(Bucket="embed", Prefix="vectors/part")["Contents"]
        return {entry["Key"]: entry["LastModified"] for entry in listed}

    before = written()
    s3.client().delete_object(Bucket="embed", Key="vectors/part-00002.parquet")
    assert "1 of 5 to do" in run_here("jobs.embed", *command)
    after = written()
    assert after.keys() == before.keys()
    changed = [key for key in after if after[key] != before[key]]
    assert changed in ([], ["vectors/part-00002.parquet"])  # times are whole seconds
    assert "is finished" in run_here("jobs.embed", *command)


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.nightly  # beside the same of a run
def test_a_forbidden_image_is_a_bad_one_that_is_named(world: Path, s3: S3Server, tmp_path: Path) -> None:
    s3.client().create_bucket(Bucket="closed")
    put_all(s3, "closed", {f"images/{i:02d}.jpg": draw_demo_image("dots", "val", i) for i in range(12)})
    with fault_proxy(s3.endpoint) as proxy:
        proxy.fail("forbid", pattern="^GET /closed/images/07.jpg", times=1_000_000)
        command = [str(world / "run"), "s3://closed/images", f"--out={tmp_path / 'out'}", "--rows-per-file=4"]
        output = run_job("jobs.embed", *command, env=aws_environment(proxy.endpoint), code=3)
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "1 of 12 images could not be used, more than data.max_bad_fraction=0.01" in errors[0]
    (bad,) = map(json.loads, (tmp_path / "out" / "_about" / "quarantine.jsonl").read_text().splitlines())
    assert (bad["key"], bad["status"]) == ("images/07.jpg", "denied")
    assert "AccessDenied" in bad["reason"]
