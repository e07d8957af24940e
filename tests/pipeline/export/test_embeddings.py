"""Parts of a directory of embeddings: what is in each, which are missing, and that every row is accounted for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import labelled_source
from remedies import settings_to_set
from tiny import TINY_RESNET, tiny_config

from dinoray.models.backbone import build_backbone
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.decoding.decode import decode, eval_crop
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.features import embed
from dinoray.pipeline.export.embeddings import (
    KIND,
    Plan,
    choose_rows_per_file,
    measure,
    weights_digest,
    write_part,
)
from dinoray.pipeline.export.parquet_parts import (
    PartFooter,
    check_bad,
    check_settings,
    collect,
    missing_parts,
    part_name,
)
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.checkpoint import FrozenBackbone
from dinoray.pipeline.training.config import DINOConfig

CONFIG = tiny_config()


def account(out: Directory, plan: Plan, parts: range) -> tuple[list[PartFooter], list[dict[str, Any]]]:
    """Of a table of nine images."""
    return collect(out, {part: plan.rows(part, 9) for part in parts}, KIND, plan.identity)


def frozen(config: DINOConfig = CONFIG, *, scale: float = 1.0) -> FrozenBackbone:
    backbone = build_backbone(config.backbone, crop_sizes=config.crops.crop_sizes, drop_path_rate=0.0)
    return FrozenBackbone(config, {k: v * scale for k, v in backbone.state_dict().items()})


@pytest.fixture(scope="module")
def network() -> FrozenBackbone:
    return frozen()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Nine images, of which rows 2 and 3 cannot be used."""
    source = labelled_source(tmp_path / "images")
    (tmp_path / "images" / "dots" / "2.jpg").write_bytes(b"no picture")
    (tmp_path / "images" / "rings" / "0.jpg").unlink()
    return source


def plan(**changes: Any) -> Plan:
    values = {
        "weights": "w",
        "embed_dim": 32,
        "num_patches": 0,
        "image_size": 16,
        "dtype": "float32",
        "precision": "fp32",
        "batch_size": 2,
        "rows_per_file": 4,
        "with_labels": True,
    }
    return Plan(**(values | changes))


def write_all(
    network: FrozenBackbone, source: Source, out: Directory, plan: Plan, parts: range = range(3)
) -> None:
    for part in parts:
        write_part(network.backbone(), source, part, out=out, crops=CONFIG.crops, plan=plan)


def vectors(table: pa.Table, column: str = "vector") -> np.ndarray:
    kind = table.schema.field(column).type
    flat = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, kind.list_size)


def test_a_part_holds_key_label_and_vector_of_each_readable_image(
    network: FrozenBackbone, source: Source, tmp_path: Path
) -> None:
    out = Directory(str(tmp_path / "out"))
    written = write_part(network.backbone(), source, 0, out=out, crops=CONFIG.crops, plan=plan())
    assert written == (0, 2, 2)
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert table.schema.field("vector").type.equals(pa.list_(pa.float32(), 32))
    assert table["key"].to_pylist() == ["dots/0.jpg", "dots/1.jpg"]
    assert table["label"].to_pylist() == ["dots", "dots"]
    crops = [
        eval_crop(decode(f.data, max_pixels=10**6), size=16)
        for f in source.fetch([0, 1])
        if f.data is not None
    ]
    expected = embed(network.backbone(), np.stack(crops), CONFIG.crops, precision="fp32")
    np.testing.assert_array_equal(vectors(table), expected)
    about = json.loads(table.schema.metadata[b"dinoray.embeddings"])
    assert [(x["row"], x["key"], x["status"]) for x in about["quarantined"]] == [
        (2, "dots/2.jpg", "corrupt"),
        (3, "rings/0.jpg", "missing"),
    ]
    assert all(x["reason"] for x in about["quarantined"])


def test_half_precision_rounds_the_same_vectors(
    network: FrozenBackbone, source: Source, tmp_path: Path
) -> None:
    tables = []
    for dtype in ("float32", "float16"):
        write_all(network, source, Directory(str(tmp_path / dtype)), plan(dtype=dtype), range(1))
        tables.append(pq.read_table(tmp_path / dtype / part_name(0)))
    assert tables[1].schema.field("vector").type.value_type == pa.float16()
    np.testing.assert_array_equal(vectors(tables[1]), vectors(tables[0]).astype(np.float16))


def test_patch_tokens_have_a_column_and_its_shape_a_note(
    network: FrozenBackbone, source: Source, tmp_path: Path
) -> None:
    width, num_patches = measure(network, 16, patch_tokens=True)
    assert (width, num_patches) == (32, 16)  # 4 x 4 patches of 4 px
    out = Directory(str(tmp_path / "out"))
    write_all(network, source, out, plan(num_patches=num_patches, with_labels=False), range(1))
    table = pq.read_table(tmp_path / "out" / part_name(0))
    assert table.column_names == ["key", "vector", "patch_tokens"]
    about = json.loads(table.schema.metadata[b"dinoray.embeddings"])
    assert (about["num_patches"], about["embed_dim"]) == (16, 32)
    tokens = vectors(table, "patch_tokens").reshape(-1, 16, 32)
    assert tokens.shape[0] == 2
    assert tokens.std(axis=1).mean() > 0.01  # patches differ


def test_a_part_of_unreadable_images_alone_is_written_too(
    network: FrozenBackbone, source: Source, tmp_path: Path
) -> None:
    out = Directory(str(tmp_path / "out"))
    write_all(network, source, out, plan(rows_per_file=1), range(2, 4))
    table = pq.read_table(tmp_path / "out" / part_name(2))
    assert (table.num_rows, table.column_names) == (0, ["key", "vector", "label"])
    footers, _ = account(out, plan(rows_per_file=1), range(2, 4))
    assert [footer.num_rows for footer in footers] == [0, 0]


def test_vectors_beyond_half_precision_are_refused(source: Source, tmp_path: Path) -> None:
    loud = frozen()
    loud.weights["norm.weight"] = loud.weights["norm.weight"] * 1e6
    out = Directory(str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"dots/0\.jpg is not finite as float16; pass --dtype float32"):
        write_all(loud, source, out, plan(dtype="float16"))
    assert out.list() == []
    write_all(loud, source, out, plan(dtype="float32"))  # as it says


def test_every_row_is_accounted_for_from_what_lies_there(
    network: FrozenBackbone, source: Source, tmp_path: Path
) -> None:
    out = Directory(str(tmp_path / "out"))
    write_all(network, source, out, plan())
    footers, bad = account(out, plan(), range(3))
    assert sum(footer.num_rows for footer in footers) == 7
    assert [record["row"] for record in bad] == [2, 3]
    lines = (tmp_path / "out" / "_about/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["dots/2.jpg", "rings/0.jpg"]


def rewritten(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-20]), "cannot be read"),
        (lambda file: file.unlink(), "cannot be read"),
        (lambda file: rewritten(file, pq.read_table(file).slice(1)), "4 rows in, but 3 vectors out and 0"),
        (
            lambda file: file.write_bytes((file.parent / part_name(2)).read_bytes()),
            "4 rows in, but 1 vectors out and 0 quarantined of part 2",
        ),
        (
            lambda file: rewritten(file, pq.read_table(file).replace_schema_metadata({})),
            "cannot be read",
        ),
    ],
    ids=["cut off", "gone", "a row lost", "another part", "not ours"],
)
def test_a_part_that_does_not_account_for_its_rows_is_named(
    spoil: Any, words: str, network: FrozenBackbone, source: Source, tmp_path: Path
) -> None:
    out = Directory(str(tmp_path / "out"))
    write_all(network, source, out, plan())
    spoil(tmp_path / "out" / part_name(1))
    with pytest.raises(DataError, match=rf"part-00001\.parquet.*{words}.*delete it and run again"):
        account(out, plan(), range(3))
    (tmp_path / "out" / part_name(1)).unlink(missing_ok=True)  # as it says
    write_all(network, source, out, plan(), range(1, 2))
    account(out, plan(), range(3))


def test_parts_of_other_weights_are_not_taken_for_ours(
    network: FrozenBackbone, source: Source, tmp_path: Path
) -> None:
    out = Directory(str(tmp_path / "out"))
    write_all(network, source, out, plan())
    with pytest.raises(DataError, match=r"part-00000\.parquet"):
        account(out, plan(weights="others"), range(3))


def test_missing_parts_are_those_that_are_not_there(
    network: FrozenBackbone, source: Source, tmp_path: Path
) -> None:
    out = Directory(str(tmp_path / "out"))
    assert missing_parts(out, 3) == [0, 1, 2]
    write_all(network, source, out, plan(), range(1, 2))
    out.write("part-00002.parquet.crc", b"")
    assert missing_parts(out, 3) == [0, 2]


@given(num_images=st.integers(1, 10_000), rows=st.integers(1, 2000))
def test_parts_hold_every_row_once(num_images: int, rows: int) -> None:
    some = plan(rows_per_file=rows)
    parts = [list(some.rows(part, num_images)) for part in range(some.num_parts(num_images))]
    assert [row for part in parts for row in part] == list(range(num_images))
    assert all(parts)


def test_the_weights_of_a_network_and_what_they_mean_are_one_identity(network: FrozenBackbone) -> None:
    assert weights_digest(network) == weights_digest(FrozenBackbone(network.config, dict(network.weights)))
    other_heads = tiny_config(
        backbone={"kwargs": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}}
    )
    other_pixels = tiny_config(crops={"pixel_mean": [0.5, 0.5, 0.5]})
    digests = {
        weights_digest(network),
        weights_digest(FrozenBackbone(other_heads, network.weights)),
        weights_digest(FrozenBackbone(other_pixels, network.weights)),
        weights_digest(FrozenBackbone(CONFIG, {k: v * 1.01 for k, v in network.weights.items()})),
    }
    assert len(digests) == 4


def test_a_network_without_tokens_has_no_patch_tokens_to_keep() -> None:
    network = frozen(
        tiny_config(backbone=TINY_RESNET | {"drop_path_rate": 0.0}, crops={"global_crop_size": 32})
    )
    assert measure(network, 32, patch_tokens=False)[1] == 0
    with pytest.raises(ConfigError, match=r"not a vision transformer; leave the option out$"):
        measure(network, 32, patch_tokens=True)


@pytest.mark.parametrize(
    ("row_bytes", "num_images", "rows"),
    [
        (768, 100, 256),  # few images: one part
        (768, 64_000, 1000),  # 64 parts
        (768, 10_000_000, 10_000),
        (197 * 768 * 2, 10_000_000, 221),  # patch tokens: 64 MiB
        (1 << 40, 10, 1),
    ],
)
def test_parts_are_many_enough_to_share_and_small_enough_to_hold(
    row_bytes: int, num_images: int, rows: int
) -> None:
    assert choose_rows_per_file(None, row_bytes=row_bytes, num_images=num_images) == rows


def test_parts_that_memory_cannot_hold_are_refused() -> None:
    assert choose_rows_per_file(1000, row_bytes=1 << 20, num_images=10) == 1000
    with pytest.raises(ConfigError, match=r"--rows-per-file 2000 .*; set at most 1024, which fit 1 GiB$"):
        choose_rows_per_file(2000, row_bytes=1 << 20, num_images=10)
    assert choose_rows_per_file(1024, row_bytes=1 << 20, num_images=10) == 1024


def test_a_directory_takes_the_settings_that_it_was_begun_with_alone(tmp_path: Path) -> None:
    out = Directory(str(tmp_path))
    assert check_settings(out, {"dtype": "float16"}, KIND) is False
    out.write("_about/embed.json", json.dumps({"dtype": "float16", "step": 7}).encode())
    assert check_settings(out, {"dtype": "float16"}, KIND) is True
    with pytest.raises(
        ConfigError, match=r"made with dtype='float16', not 'float32'; set it back, or choose an"
    ):
        check_settings(out, {"dtype": "float32", "step": 7}, KIND)
    assert check_settings(out, {"dtype": "float16", "step": 7}, KIND) is True
    another = out.child("another")
    assert check_settings(another, {"dtype": "float32", "step": 7}, KIND) is False


def test_damaged_settings_are_those_of_no_directory(tmp_path: Path) -> None:
    out = Directory(str(tmp_path))
    out.write("_about/embed.json", b"{")
    with pytest.raises(DataError, match=r"_about/embed\.json is damaged .*; choose another --out$"):
        check_settings(out, {}, KIND)
    assert check_settings(out.child("another"), {}, KIND) is False


def test_parts_of_unknown_origin_are_not_continued(tmp_path: Path) -> None:
    out = Directory(str(tmp_path))
    out.write(part_name(3), b"")
    with pytest.raises(ConfigError, match=r"no _about/embed\.json; choose another --out, or remove them$"):
        check_settings(out, {}, KIND)
    assert check_settings(out.child("another"), {}, KIND) is False
    out.delete(part_name(3))
    assert check_settings(out, {}, KIND) is False


def test_too_many_bad_images_are_an_error_that_says_where_they_are_named(tmp_path: Path) -> None:
    out = Directory(str(tmp_path))
    check_bad(1, 100, limit=0.01, out=out, kind=KIND)
    with pytest.raises(
        DataError, match=r"2 of 100 .* data\.max_bad_fraction=0\.01.*quarantine\.jsonl"
    ) as error:
        check_bad(2, 100, limit=0.01, out=out, kind=KIND)
    (setting,) = settings_to_set(str(error.value))
    check_bad(2, 100, limit=float(setting.removeprefix("data.max_bad_fraction=")), out=out, kind=KIND)
