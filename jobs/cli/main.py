"""How every job starts and ends: errors become one line and an exit code, Ray starts or is joined."""

import os
import select
import signal
import sys
from collections.abc import Callable, Sequence

import ray
from ray.exceptions import AuthenticationError

from dinoray.jobs.cli.progress_line import show_progress_lines
from dinoray.jobs.cli.quiet import quiet_ray
from dinoray.jobs.cli.ray_watch import answers, end_at_once, print_error, watch_ray
from dinoray.models.commands import command
from dinoray.models.errors import ResourceError, one_line
from dinoray.pipeline.cluster.lost_ray import LostRayError, error_to_print
from dinoray.pipeline.cluster.resources import ResourcesConfig


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Run a job's `main(argv)` and exit: 0 done, 2 config, 3 data or storage, 4 resources, 1 anything else.

    Ctrl-C and SIGTERM (`ray job stop`, the end of a pod) raise KeyboardInterrupt in `main`, which may name the
    place that the same command continues from: `KeyboardInterrupt("step 120")`.
    """
    _take_sigterm_as_interrupt()
    show_progress_lines()
    try:
        main(sys.argv[1:])
        print(end="", flush=True)
    except KeyboardInterrupt as stop:
        remedy = (
            f"the same command resumes from {stop}" if str(stop) else "to go on, run the same command again"
        )
        sys.exit(f"stopped; {remedy}")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_cut_off():
            sys.exit(1)
        known = error_to_print(error)
        if known is None:
            raise
        if isinstance(known, LostRayError):
            end_at_once(known)
        print_error(known)
        sys.exit(known.exit_code)


def _is_cut_off() -> bool:
    """Whether whoever read our output, `head` say, has had enough; nothing more is then written to it."""
    output = select.poll()
    output.register(1)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def start_ray(
    resources: ResourcesConfig, *, verbose: bool, num_streams: int = 1
) -> tuple[bool, tuple[int, int]]:
    """Join the cluster of a submitted job, else start a local Ray; return (use_gpu, augment actors [least, most]).

    There are at least `num_streams` augment actors, one for each stream of a run.

    A local Ray is given as many logical CPUs as the run asks for, at least the machine's: the operating system
    shares the real ones. ResourceError when GPUs are asked for that a local machine does not have.
    """
    needed = resources.least_cpus(num_streams)
    local = join_ray(needed, verbose=verbose)
    have = ray.cluster_resources()
    cpus, gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
    use_gpu = gpus > 0 if resources.use_gpu == "auto" else resources.use_gpu
    if local and use_gpu:
        check_gpus(resources, gpus)
    if cpus < needed or (use_gpu and gpus < resources.least_workers):
        print(
            f"the cluster has {cpus} CPUs and {gpus} GPUs, the run needs {needed} CPUs"
            f"{f' and {resources.least_workers} GPUs' if use_gpu else ''}: waiting for nodes to join",
            flush=True,
        )
    if not local and not use_gpu and resources.use_gpu == "auto":
        print(
            "no GPU node is up: training on CPUs; set resources.use_gpu=true to wait for GPU nodes",
            flush=True,
        )
    spare = resources.spare_actors(cpus, num_streams)
    least, most = resources.least_actors(num_streams), resources.actor_range[1]
    return use_gpu, (least, max(num_streams, spare) if most is None else most)


def check_gpus(resources: ResourcesConfig, gpus: int) -> None:
    """ResourceError where this machine has fewer GPUs than train workers."""
    if gpus < resources.least_workers:
        asked = (
            f"resources.train_workers={resources.least_workers} with resources.use_gpu={resources.use_gpu}"
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
    are more; whether it is local. LostRayError ends a job whose Ray is lost after this."""
    options = quiet_ray(verbose=verbose)
    local = is_local()
    if local:
        options |= {"address": "local", "num_cpus": max(os.cpu_count() or 1, local_cpus)}
        options |= {"include_dashboard": dashboard}
    else:
        _check_address(os.environ["RAY_ADDRESS"])
    try:
        ray.init(**options)
        watch_ray(local=local)
    except AuthenticationError as error:
        raise wants_token(os.environ.get("RAY_ADDRESS", "the local Ray"), error) from error
    except Exception as error:  # one of them is a bare Exception
        if not local:
            raise _not_joined(os.environ["RAY_ADDRESS"], one_line(error)) from error
        raise not_started(error) from error
    except SystemExit as stop:
        if stop.code != signal.SIGTERM:  # Ray's own way out upon it, until ours is back
            raise
        raise KeyboardInterrupt from stop
    _take_sigterm_as_interrupt()
    return local


def _check_address(address: str) -> None:
    """ResourceError where no head answers at `address`: Ray itself would try for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        raise _not_joined(address, "it is not the HOST:PORT of a Ray head")
    if not answers(host, int(port), timeout_seconds=10):
        raise _not_joined(address, "nothing answers there")


def _not_joined(address: str, why: str) -> ResourceError:
    return ResourceError(
        f"RAY_ADDRESS={address} cannot be joined: {why}; start a head there, unset RAY_ADDRESS to start a local Ray, "
        f"or submit the job with `{command('submit')}`"
    )


def not_started(error: Exception) -> ResourceError:
    """A local Ray that does not start, and what helps."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    text = one_line(error).rstrip(".")
    if "AF_UNIX path length" in text:
        remedy = f"the path {folder} is too long for Ray's sockets: set a shorter one, e.g. RAY_TMPDIR=/tmp"
    elif isinstance(error, OSError):
        remedy = f"free space in {folder}, or set RAY_TMPDIR to another folder"
    elif "timed out" in text:
        remedy = "wait until this machine is less busy, then run the same command again"
    else:
        remedy = f"see its logs in {folder}/ray/session_latest/logs"
    return ResourceError(f"a local Ray does not start: {text}; {remedy}")


def wants_token(address: str, error: AuthenticationError) -> ResourceError:
    """What to do where Ray was asked without a token, or with a wrong one."""
    return ResourceError(
        f"{address} requires a token ({one_line(error, limit=80)}); set RAY_AUTH_MODE=token and put the "
        "cluster's token into ~/.ray/auth_token (on the head: ray get-auth-token)"
    )


def _take_sigterm_as_interrupt() -> None:
    """SIGTERM is taken as Ctrl-C: what is open is closed, a local Ray among it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
