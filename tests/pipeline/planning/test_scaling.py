"""The efficiency on more GPUs, against numbers computed by hand."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.planning.prices import NodeType
from dinoray.pipeline.planning.scaling import BUCKET_BYTES, Scaled, scaled

NODE = NodeType(hourly=1, cpus=48, gpus=4, gbit=100, memory_gib=384)


def of(gpus: int, **changes: Any) -> Scaled:
    """Steps of 100 ms with four buckets of gradients, on nodes whose link carries 10 GB/s."""
    given = {"step_seconds": 0.1, "gradient_bytes": 4 * BUCKET_BYTES, "crop_bytes_per_second": 0.0}
    return scaled(gpus, **(given | {"node": NODE} | changes))


def test_one_gpu_exchanges_nothing() -> None:
    assert of(1) == Scaled(1, 0, 0, 1)


def test_most_of_the_exchange_hides_behind_the_backward_pass() -> None:
    # 2 * 7/8 of 104,857,600 bytes at 10 GB/s take 18.35 ms, less than half of the step. The last of four buckets is
    # waited for, 4.5875 ms, and 5 collectives of 2 * 3 hops of 20 us: 0.6 ms. 100 / 105.1875 = 95.07 %.
    assert of(8) == (
        8,
        pytest.approx(0.01835008),
        pytest.approx(0.00518752),
        pytest.approx(0.950683, abs=1e-6),
    )


def test_an_exchange_longer_than_the_backward_pass_is_waited_for() -> None:
    # A step of 20 ms hides 10 of 2 * 63/64 * 104,857,600 / 10e9 = 20.6438 ms; 5 * 2 * 6 hops take 1.2 ms.
    found = of(64, step_seconds=0.02)
    assert found.waited_seconds == pytest.approx(0.0106438 + 0.0012, abs=1e-7)
    assert found.efficiency == pytest.approx(0.02 / 0.0318438, abs=1e-5)


def test_gpus_of_one_node_use_its_bus() -> None:
    # 2 * 3/4 of the bytes at 16 GB/s.
    assert of(4).exchange_seconds == pytest.approx(0.0098304)


def test_crops_take_their_part_of_the_link() -> None:
    # Four GPUs take 1.25 GB/s each of the 10 GB/s; with 2.5 GB/s each nothing is left.
    assert of(8, crop_bytes_per_second=1.25e9).exchange_seconds == pytest.approx(2 * of(8).exchange_seconds)
    assert of(8, crop_bytes_per_second=2.5e9).efficiency == 0


@given(st.integers(2, 512), st.floats(1e-3, 10), st.integers(1, 10**10))
def test_more_nodes_never_raise_the_efficiency(gpus: int, seconds: float, size: int) -> None:
    changes = {"step_seconds": seconds, "gradient_bytes": size, "node": NODE.model_copy(update={"gpus": 1})}
    fewer, more = of(gpus, **changes), of(2 * gpus, **changes)
    assert 0 < more.efficiency <= fewer.efficiency < 1
