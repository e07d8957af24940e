"""How every job starts and ends: errors become one line and an exit code, Ray starts or is joined."""

import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError

from models.settings import ResourceError, one_line
from pipeline.board import known_error
from pipeline.resources import ResourcesConfig


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Run a job's `main(argv)` and exit: 0 done, 2 config, 3 data or storage, 4 resources, 1 anything else.

    Ctrl-C and SIGTERM (`ray job stop`, the end of a pod) raise KeyboardInterrupt in `main`, which may name the
    place that the same command continues from: `KeyboardInterrupt("step 120")`.
    """
    _heed_sigterm()
    try:
        main(sys.argv[1:])
        print(end="", flush=True)
    except KeyboardInterrupt as stop:
        goes_on = f"the same command continues from {stop}" if str(stop) else "run it again to go on"
        sys.exit(f"stopped; {goes_on}")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_cut_off():
            sys.exit(1)
        known = known_error(error)
        if known is None:
            raise
        for line in str(known).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(known.exit_code)


def _is_cut_off() -> bool:
    """Whether whoever read our output, `head` say, has had enough; nothing more is then written to it."""
    output = select.poll()
    output.register(1)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def start_ray(resources: ResourcesConfig, *, verbose: bool) -> tuple[bool, tuple[int, int]]:
    """Join the cluster of a submitted job, else start a local Ray; return (use_gpu, augment actors [least, most]).

    A local Ray is given as many logical CPUs as the run asks for, at least the machine's: the operating system
    shares the real ones. ResourceError when GPUs are asked for that a local machine does not have.
    """
    train_cpus = resources.train_workers * resources.cpus_per_train_worker
    least = _range(resources.augment_actors, default=(1, 1))[0]
    # One more than the run needs: with none left over, Ray's own small tasks would wait for ever.
    needed = ceil(train_cpus + least * resources.cpus_per_augment_actor) + 1
    local = join_ray(needed, verbose=verbose)
    have = ray.cluster_resources()
    cpus, gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
    use_gpu = gpus > 0 if resources.use_gpu == "auto" else resources.use_gpu
    if local and use_gpu:
        check_gpus(resources, gpus)
    if cpus < needed or (use_gpu and gpus < resources.train_workers):
        print(
            f"the cluster has {cpus} CPUs and {gpus} GPUs, the run needs {needed} CPUs"
            f"{f' and {resources.train_workers} GPUs' if use_gpu else ''}: waiting for nodes to join",
            flush=True,
        )
    if not local and not use_gpu and resources.use_gpu == "auto":
        print("no GPU node is up: training on CPUs; resources.use_gpu=true waits for GPU nodes", flush=True)
    spare = int((cpus - train_cpus - 1) // resources.cpus_per_augment_actor)
    return use_gpu, _range(resources.augment_actors, default=(1, max(1, spare)))


def check_gpus(resources: ResourcesConfig, gpus: int) -> None:
    """ResourceError where this machine has fewer GPUs than train workers."""
    if gpus < resources.train_workers:
        asked = (
            f"resources.train_workers={resources.train_workers} with resources.use_gpu={resources.use_gpu}"
        )
        fewer = f"set resources.train_workers={gpus}, or " if gpus else ""
        raise ResourceError(
            f"{asked.lower()} need a GPU each, this machine has {gpus}; "
            f"{fewer}set resources.use_gpu=false to train on CPUs"
        )


def is_local() -> bool:
    """Whether Ray will be a job's own, on this machine: no cluster's address is in the environment."""
    return "RAY_ADDRESS" not in os.environ


def join_ray(local_cpus: int, *, verbose: bool, dashboard: bool = False) -> bool:
    """Join the cluster of a submitted job, else start a Ray of `local_cpus` logical CPUs, or the machine's if those
    are more; whether it is local."""
    level = logging.INFO if verbose else logging.ERROR
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level}
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(level)
    local = is_local()
    if local:
        options |= {"address": "local", "num_cpus": max(os.cpu_count() or 1, local_cpus)}
        options |= {"include_dashboard": dashboard}
    try:
        ray.init(**options)
    except AuthenticationError as error:
        raise wants_token(os.environ.get("RAY_ADDRESS", "the local Ray"), error) from error
    except (OSError, RuntimeError, ValueError, RayError) as error:
        what, remedy = "a local Ray does not start", "look at its logs in /tmp/ray"
        if not local:
            what = f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be joined"
            remedy = "unset it to start a local Ray, or go through jobs.submit"
        raise ResourceError(f"{what}: {one_line(error)}; {remedy}") from error
    except SystemExit as stop:
        if stop.code != signal.SIGTERM:  # Ray's own way out upon it, until ours is back
            raise
        raise KeyboardInterrupt from stop
    _heed_sigterm()
    return local


def wants_token(address: str, error: AuthenticationError) -> ResourceError:
    """What to do where Ray was asked without a token, or with a wrong one."""
    return ResourceError(
        f"{address} asks for a token ({one_line(error, limit=80)}); set RAY_AUTH_MODE=token and put the "
        "cluster's token into ~/.ray/auth_token (on the head: ray get-auth-token)"
    )


def _heed_sigterm() -> None:
    """SIGTERM is taken as Ctrl-C: what is open is closed, a local Ray among it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _range(actors: "int | tuple[int, int] | str", *, default: tuple[int, int]) -> tuple[int, int]:
    if isinstance(actors, int):
        return actors, actors
    return actors if isinstance(actors, tuple) else default
