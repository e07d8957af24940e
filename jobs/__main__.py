"""List the commands: `dinoray` or `python -m jobs`."""

import ast
from pathlib import Path

ORDER = (
    "pretrain",
    "plan",
    "doctor",
    "submit",
    "tune",
    "evaluate",
    "attention",
    "embed",
    "export",
    "replay",
    "pack",
    "manifest",
)


def describe_commands() -> str:
    """One line per command, read from its docstring: importing all commands takes seconds."""
    lines = [
        "Commands; --help of each lists its arguments; in a checkout, `python -m jobs.NAME` is `dinoray NAME`:"
    ]
    for name in ORDER:
        text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text())) or ""
        purpose, _, usage = text.partition("\n")[0].partition("`")
        lines.append(f"  {name:<10} {purpose.rstrip(' :')}\n             {usage.partition('`')[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe_commands())
