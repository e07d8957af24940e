"""File names in a run directory, and its committed checkpoints. No Ray here."""

import json

from pipeline.storage.files import Directory, MissingObject

SNAPSHOT = "checkpoint_manager_snapshot.json"


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint that is taken before `step` runs."""
    return f"step_{step:08d}"


def committed_checkpoints(run: Directory) -> list[str]:
    """Return the names of the run's committed checkpoints, oldest first."""
    try:
        snapshot = json.loads(run.read(f"checkpoints/{SNAPSHOT}"))
    except MissingObject:
        return []
    return sorted({r["checkpoint_dir_name"] for r in snapshot.get("checkpoint_results", [])})


def committed_steps(run: Directory) -> list[int]:
    """Return the steps of the run's committed checkpoints, ascending."""
    return sorted(int(name.removeprefix("step_")) for name in committed_checkpoints(run))
