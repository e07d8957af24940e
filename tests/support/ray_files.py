"""The files that may import Ray."""

RAY_FILES = {
    *(
        f"pipeline/cluster/{name}.py"
        for name in ("channel", "lost_ray", "nodes", "pool_control", "pool_mailbox")
    ),
    *(f"pipeline/stream/{name}.py" for name in ("ray_data", "readers", "shared_stream")),
    *(
        f"pipeline/worker/{name}.py"
        for name in (
            "driver",
            "ending",
            "evaluations",
            "evaluator",
            "fit",
            "worker",
            "outputs",
            "spec",
            "restoring",
            "saving",
            "signs",
            "watches",
        )
    ),
    *(f"pipeline/study/search/{name}.py" for name in ("tuner", "tuning", "population")),
    "pipeline/evaluation/actors.py",
    "pipeline/tracking/prometheus.py",
    *(f"pipeline/ray_private/{name}.py" for name in ("core", "data", "jobs", "nodes", "tune")),
    *(f"pipeline/ray_private/train_{name}.py" for name in ("checkpoints", "controller", "policies")),
}
