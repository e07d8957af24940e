"""The files that may import Ray."""

RAY_FILES = {
    *(
        f"pipeline/cluster/{name}.py"
        for name in ("channel", "lost_ray", "nodes", "pool_control", "pool_mailbox")
    ),
    *(f"pipeline/stream/{name}.py" for name in ("ray_data", "readers", "shared_stream")),
    *(
        f"pipeline/worker/{name}.py"
        for name in ("driver", "worker", "outputs", "spec", "restoring", "saving")
    ),
    *(f"pipeline/study/search/{name}.py" for name in ("tuner", "tuning", "population")),
    "pipeline/evaluation/actors.py",
    "pipeline/tracking/prometheus.py",
    *(f"pipeline/ray_private/{name}.py" for name in ("core", "data", "jobs", "tune")),
    *(f"pipeline/ray_private/{name}.py" for name in ("train_controller", "train_checkpoints")),
}
