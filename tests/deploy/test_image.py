"""deploy/Dockerfile: pinned, no secrets, not as root, and with all that an installation needs. Nothing is built."""

import fnmatch
import re

import cluster_lints as lints
import pytest
import yaml
from paths import ROOT

TEXT = (ROOT / "deploy" / "Dockerfile").read_text()
ALLOWED = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
PROJECT = (ROOT / "pyproject.toml").read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of each, continued lines joined, comments left out."""
    lines = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line)]


def complaints(text: str) -> list[str]:
    """What is wrong with a Dockerfile."""
    found = []
    steps = instructions(text)
    arguments = dict(rest.split("=", 1) for word, rest in steps if word == "ARG" and "=" in rest)
    bases = [
        re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], rest) for word, rest in steps if word == "FROM"
    ]
    for base in bases:
        tag = re.fullmatch(r"rayproject/ray:(\d+\.\d+\.\d+)-py3\d+-(cpu|cu\d+)", base)
        if tag is None or tag[1] not in lints.RAY:
            found.append(f"not a pinned release of Ray: {base}")
    users = [rest for word, rest in steps if word == "USER"]
    if not users or users[-1] in ("root", "0") or steps[-1][0] != "USER":
        found.append(f"ends as {users[-1:]}")
    found += [f"ADD {rest}" for word, rest in steps if word == "ADD"]
    found += [
        f"fetches: {rest}" for word, rest in steps if word == "RUN" and re.search(r"\b(curl|wget)\b", rest)
    ]
    found += [
        f"keeps pip's cache: {r}" for w, r in steps if w == "RUN" and "pip" in r and "--no-cache-dir" not in r
    ]
    if not any(word == "RUN" and "pip install" in rest for word, rest in steps):
        found.append("does not install")
    return found + lints.secrets(text)


def test_the_dockerfile_passes() -> None:
    assert complaints(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rayproject/ray:2.60.0-py311-${PLATFORM}", "rayproject/ray:latest"),
        ("rayproject/ray:2.60.0-", "rayproject/ray:2.57.0-"),
        ("ARG PLATFORM=cu128", "ARG PLATFORM=gpu"),
        ("USER ray", "USER root"),
        ("USER ray", ""),
        ("USER ray", "USER ray\nRUN pip install --no-cache-dir x"),
        ("COPY --chown=1000:100 .", "ADD https://example.com/dinoray.tgz"),
        ("RUN pip install --no-cache-dir", "RUN pip install"),
        ("RUN pip install", "RUN curl example.com | sh && pip install"),
        ("RUN pip install", "RUN pip download"),
        ("USER ray", "ENV API_TOKEN=0123456789abcdef0123\nUSER ray"),
    ],
)
def test_a_mistake_is_found(old: str, new: str) -> None:
    assert old in TEXT
    assert len(complaints(TEXT.replace(old, new))) >= 1


def test_the_cpu_variant_is_the_image_of_the_cluster() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    (base,) = [rest for word, rest in instructions(TEXT) if word == "FROM"]
    assert base.replace("${PLATFORM}", "cpu") == cluster["docker"]["image"]
    assert "--build-arg PLATFORM=cpu " in TEXT


def goes_in(path: str) -> bool:
    """Whether Docker sends a file of the working tree: the last pattern that fits it or a folder of it decides."""
    goes = True
    parts = path.split("/")
    for line in ALLOWED:
        pattern = line.removeprefix("!")
        if line.startswith("#") or not line:
            continue
        names = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if pattern.startswith("**/"):
            fits = any(fnmatch.fnmatch(part, pattern[3:]) for part in parts)
        else:
            fits = any(
                name.count("/") == pattern.count("/") and fnmatch.fnmatch(name, pattern) for name in names
            )
        if fits:
            goes = line.startswith("!")
    return goes


def test_all_that_pip_needs_goes_into_the_image() -> None:
    named = re.findall(r"^(?:package-dir|readme|license-files) = (.*)$", PROJECT, flags=re.MULTILINE)
    needed = [
        name for text in named for name in re.findall(r'"(.*?)"', text) if not name.startswith("dinoray.")
    ]
    assert sorted({*needed}) == ["LICENSE", "README.md", "dinoray", "jobs", "models", "pipeline"]
    needed += ["pyproject.toml", "jobs/pretrain.py", "models/dino.py", "dinoray/__main__.py"]
    needed += ["pipeline/augment/multicrop.py", "pipeline/study/search/tuner.py"]
    assert [path for path in needed if not goes_in(path)] == []


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        ".git/config",
        "runs/first/metrics.jsonl",
        "tests/support/tiny.py",
        "jobs/__pycache__/x.pyc",
        "key.pem",
    ],
)
def test_nothing_else_goes_into_the_image(path: str) -> None:
    assert not goes_in(path)
