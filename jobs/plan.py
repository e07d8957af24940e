"""Estimate nodes, time and cost of a run: `dinoray plan [--recipe NAME] [--out FILE] [key=value ...]`.

Figures, given or measured for some seconds -> nodes, hours, dollars, what limits them -> the command that starts the
run, and cluster.yaml filled in. Starts nothing itself, and rents nothing.
"""

from collections.abc import Sequence

from dinoray.jobs.cli.config import json_schema
from dinoray.jobs.cli.main import run_main
from dinoray.jobs.cli.print_config import describe_config
from dinoray.jobs.cluster.plan_config import PlanArguments, PlanConfig, plan_config


def main(argv: Sequence[str]) -> None:
    """Parse, check, measure what is not given, forecast, and say it all."""
    arguments = PlanArguments().parse_args(argv)
    if arguments.json_schema:
        print(json_schema(PlanConfig))
        return
    if arguments.print_config:
        print(describe_config(PlanConfig, arguments), end="")
        return
    config = plan_config(arguments)
    # Only now: what follows loads PyTorch, for which --help and a wrong option need not wait.
    from dinoray.jobs.cluster.planning import plan

    plan(config, arguments)


if __name__ == "__main__":
    run_main(main)
