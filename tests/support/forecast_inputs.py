"""A run and measured figures in round numbers."""

from dinoray.pipeline.planning.node_rates import STREAM_SHARE, Figures, Run
from dinoray.pipeline.training.config import CheckpointConfig

RUN = Run(
    total_steps=4000,
    global_batch_size=1000,
    train_workers=4,
    crop_bytes=500_000,
    gradient_bytes=100_000_000,
    forwards_per_image=10,
    evaluations=2,
    pausing_evaluations=2,
    images_per_evaluation=0,
    checkpoints=0,
    checkpoint=CheckpointConfig(),
    prefetch_batches=2,
    cpus_per_train_worker=1,
    cpus_per_augment_actor=1,
    most_actors=None,
    fetch_concurrency=32,
)
"""4 million images. A block holds a step of one worker: 250 images of 500 kB, 125 MB."""


FIGURES = Figures(
    images_per_second_per_cpu=100 / STREAM_SHARE,  # 100 images/s an actor once through Ray
    images_per_second_per_gpu=1000,
    bytes_per_image=100_000,
    images_per_request=1,
    latency_ms=0,
)
