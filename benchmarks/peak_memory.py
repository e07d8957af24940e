"""The most memory that torch holds during some work, counted by its allocators."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """Return how much more memory torch's CPU allocator has given out during `work`, at most, than before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def peak_of_step(step: Callable[[], object], device: torch.device, *, held: int) -> int:
    """Return the peak of a training step whose weights and moments take `held` bytes.

    On a GPU what its allocator counts, on a CPU `held` and what the step adds to it.
    """
    if device.type != "cuda":
        return held + peak_bytes(step)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
