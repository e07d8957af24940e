"""What Ray Data is told about the pool of augment actors. The whole of it, on a cluster: test_autoscaling.py."""

from types import SimpleNamespace

from pipeline.pool import DrainPolicy, pool_metrics


def operator(*, running: int, most: int, in_flight: int) -> SimpleNamespace:
    """As much of Ray's operator as is asked."""
    pool = SimpleNamespace(
        num_running_actors=lambda: running, max_size=lambda: most, num_tasks_in_flight=lambda: in_flight
    )
    return SimpleNamespace(get_autoscaling_actor_pools=lambda: [pool])


def test_a_pool_of_the_right_size_takes_what_ray_gives_it() -> None:
    assert DrainPolicy().can_add_input(operator(running=3, most=3, in_flight=12))


def test_a_pool_that_is_too_large_takes_less_than_would_keep_all_its_actors_at_work() -> None:
    assert not DrainPolicy().can_add_input(operator(running=3, most=2, in_flight=2))
    assert DrainPolicy().can_add_input(operator(running=3, most=2, in_flight=1))


def test_what_is_no_pool_is_not_held_back() -> None:
    assert DrainPolicy().can_add_input(SimpleNamespace(get_autoscaling_actor_pools=list))


def test_nothing_is_logged_of_a_pool_before_it_is_known() -> None:
    assert pool_metrics({}) == {}
    assert pool_metrics({"running": 2, "pending": 1, "target": 3}) == {
        "augment_actors": 2,
        "augment_target": 3,
    }
