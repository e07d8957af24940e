"""Each message of an error that a user can meet says what to do, or is here with the reason why it cannot.

Whether doing so ends the error is shown by the tests of each room; they take the remedy out of the message.
"""

import ast
import re

from paths import ROOT

ROOMS = ("models", "pipeline", "jobs", "dinoray")
KINDS = {"ConfigError", "DataError", "ResourceError", "DinorayError"}
ORDERS = """set pass give take choose try leave check write add delete remove install pip run save download upload start
    restore allow name point mend fix make move lower search train export use copy rename list see connect resume read
    plan stop free"""
REMEDY = re.compile(
    rf"[;:,] (?:or |and |then )*(?:also )?(?:{'|'.join(ORDERS.split())})\b|\bmust (?:be|hold|look)\b|did you mean"
    r"|--help lists|; \{|\{(?:near|name_hint|[\w.]*remedy)\b|\{_[A-Z]+\}$"
)
"""An order, or a rule; a constant at the end, and what is put in after a semicolon, is a remedy of its own."""

NONE = {
    "{'\\n'.join(": "lines of other messages",
    "tune.space: {key}: {why}": "an error of pydantic's, or a hint",
    "{_misfit(": "made where its remedy is",
    "{len(damaged)} of {self.shards.num_rows} Parquet shards": "ends with the message about the first of them",
    "{str(refusal)}": "a message that was raised before",
    "{line} (at most": "the line before has it",
    "torn": "the list is made again from the checkpoints themselves",
    "not of the form": "the list is made again from the checkpoints themselves",
    "{key} leads out of": "the reason of a bad image, in a manifest that somebody else has made",
    "{path} holds {size} bytes": "the reason of a bad image",
    "{uri} holds {length} bytes": "the reason of a bad image",
    "{path}: {error.strerror or error}": "the reason of a bad image",
    "the stream ended at": "a bug",
    "step={step} rank={rank} received": "a bug",
    "{positions - self.first} positions of the stream": "a bug",
    "training ended at": "a bug",
    "batch has {rows[0]} rows": "a bug",
}
"""Beginning of a message -> why it has no remedy."""


def text(node: ast.AST) -> str:
    """The message, with what is put in as code in braces."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text(value) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return str(node.value) if isinstance(node, ast.Constant) else f"{{{ast.unparse(node)}}}"


def adds_remedy(kind: ast.ClassDef) -> bool:
    """Whether errors of this kind put their remedy after what they are made of: LostRayError, for one."""
    return "__str__" in {node.name for node in kind.body if isinstance(node, ast.FunctionDef)}


def messages() -> dict[str, str]:
    """Place -> message, of the errors that a user can fix, of those derived from them, and of lists of mistakes."""
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    nodes = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text()))]
    kinds = set(KINDS)
    for _ in range(3):
        classes = (node for _, node in nodes if isinstance(node, ast.ClassDef) and not adds_remedy(node))
        kinds |= {node.name for node in classes if {ast.unparse(base) for base in node.bases} & kinds}
    calls = [(file, node) for file, node in nodes if isinstance(node, ast.Call) and node.args]
    return {
        f"{file.relative_to(ROOT)}:{call.lineno}": text(call.args[0])
        for file, call in calls
        if (name := ast.unparse(call.func)) in kinds or name == "mistakes.append"
    }


def test_each_message_says_what_to_do_or_is_among_those_that_cannot() -> None:
    without = {place: message for place, message in messages().items() if not REMEDY.search(message)}
    beginnings = {
        place: [known for known in NONE if message.startswith(known)] for place, message in without.items()
    }
    assert [place for place, known in beginnings.items() if not known] == []
    assert {known for some in beginnings.values() for known in some} == set(NONE)
