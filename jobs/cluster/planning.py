"""One plan: what is not given is measured, then nodes, hours and dollars are forecast and printed."""

import json
import os
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from rich.console import Console

from dinoray.jobs.cluster.cluster_file import write_cluster_file
from dinoray.jobs.cluster.measure import measure, run_of
from dinoray.jobs.cluster.plan_config import BUCKET, PlanConfig
from dinoray.jobs.cluster.plan_lines import (
    cluster_rows,
    figure_rows,
    machine_rows,
    other_sizes,
    run_command,
    settings_of,
    show,
    size_table,
)
from dinoray.jobs.cluster.step_lines import scaling_of
from dinoray.jobs.runs.run_files import draw_demo
from dinoray.pipeline.planning.forecast import Forecast, forecast, forecast_here
from dinoray.pipeline.worker.driver import check_run


def plan(config: PlanConfig, arguments: Namespace) -> None:
    """Check, measure what is not given, forecast, and say it all."""
    check_run(config)
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    if config.data.path != BUCKET:
        draw_demo(config, progress)
    measured = measure(config, progress.print, verbose=arguments.verbose)
    run, cores = run_of(config, measured), os.cpu_count() or 1
    if measured.on_gpus:
        found = forecast(run, measured.figures, config.plan)
        others, settings = other_sizes(config, run, measured), settings_of(config, found)
    else:
        found = forecast_here(run, measured.figures, config.plan, cores=cores)
        others, settings = [], {}
    made_from = write_cluster_file(arguments.out, config.plan, found) if arguments.out else None
    start = run_command(arguments, config, settings)
    if arguments.json:
        facts = {"figures": measured.figures._asdict(), "num_images": measured.num_images}
        facts |= {"sources": measured.sources, "plan": _facts(found), "command": start}
        if measured.on_gpus:
            facts["scaling"] = [x._asdict() for x in scaling_of(config, run, measured)]
        print(json.dumps({**facts, "other_sizes": [_facts(other) for other in others]}))
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    rows = figure_rows(measured)
    rows += (
        cluster_rows(config, run, measured, found) if measured.on_gpus else machine_rows(run, found, cores)
    )
    show(rows, console.print)
    if others:
        rate = measured.figures.images_per_second_per_gpu
        console.print(
            f"other numbers of GPUs, if each trains on {rate:,.0f} images/s and its share of the batch fits:"
        )
        for line in size_table(others):
            console.print(line)
    if made_from:
        console.print(f"{arguments.out} is made from {made_from}; edit its lines marked EDIT")
    console.print(start)


def _facts(found: Forecast) -> dict[str, Any]:
    """As JSON, with what is derived."""
    facts = asdict(found)
    facts["of_a_cpu_node"] = found.of_a_cpu_node._asdict()
    return {**facts, "hours": found.hours, "total_dollars": found.total_dollars}
