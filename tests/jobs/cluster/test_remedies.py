"""Each message about a setting names a remedy, and following it as it is written ends the error.

The remedy is read from the message itself and applied to the command line that was wrong. No Ray here.
"""

import ast
import re
from functools import cache

import pytest
from paths import ROOT

from dinoray.jobs.cli.arguments import PretrainArguments, pretrain_config
from dinoray.jobs.cluster.measure import Measured, run_of
from dinoray.jobs.cluster.plan_config import PlanArguments, plan_config
from dinoray.jobs.cluster.plan_lines import other_sizes
from dinoray.jobs.studies.config import StudyArguments, first_points, objective_of, space_of, study_config
from dinoray.models.errors import ConfigError
from dinoray.pipeline.planning.forecast import forecast
from dinoray.pipeline.planning.node_rates import Figures
from dinoray.pipeline.worker.driver import check_run

VANILLA = ["--recipe", "vit_small_imagenet_vanilla"]
NET = [
    "backbone.kwargs={embed_dim: 16, depth: 1, num_heads: 2}",
    "backbone.drop_path_rate=0",
    "head.out_dim=64",
]
RUN = [*VANILLA, "data.path=/x", *NET]
CNN = [*VANILLA, "data.path=/x", "backbone.drop_path_rate=0"]
STUDY = ["tune.trials=4"]
PLAN = [*RUN, "plan.num_images=1000", "plan.bytes_per_image=1000", "plan.latency_ms=25"]
PLAN += ["plan.images_per_second_per_cpu=250", "plan.images_per_second_per_gpu=800"]
TEMP = "tune.space={loss.teacher_temp: {log: [0.02, 0.1]}}"

RUNS: dict[str, list[str]] = {
    "unknown key": [*RUN, "optim.base_lrr=1"],
    "key of the network": [*CNN, "backbone.depth=2"],
    "key that the images decide": [*RUN, "backbone.in_chans=1"],
    "argument that the images decide": [*CNN, "backbone.kwargs={in_chans: 1, depth: 1}"],
    "argument with a setting of its own": [*CNN, "backbone.kwargs={drop_path_rate: 0.1}"],
    "unknown argument": [*CNN, "backbone.kwargs={depth: 1, bogus: 1}"],
    "argument that gives maps": [*CNN, "backbone.kwargs={depth: 1, global_pool: ''}"],
    "unknown recipe": ["--recipe", "vit_small_imagenet_vanila", "data.path=/x", *NET],
    "missing": [*VANILLA, *NET],
    "no number": [*RUN, "train.epochs=many"],
    "too small": [*RUN, "optim.base_lr=-1"],
    "no choice": [*RUN, "optim.name=adam"],
    "no list": [*RUN, "eval.k=5"],
    "no flag": [*RUN, "head.use_bn=perhaps"],
    "no section.key": [*RUN, "optim"],
    "other name": [*CNN, "backbone.name=vit_tiny_16"],
    "misspelt name": [*CNN, "backbone.name=resnet10tt"],
    "name like no other": [*CNN, "backbone.name=zzzz"],
    "unknown tag": [*CNN, "backbone.name=resnet10t.zzz"],
    "no stochastic depth": [*CNN, "backbone.name=repghostnet_050", "backbone.drop_path_rate=0.1"],
    "one size alone": [*CNN, "backbone.name=convit_tiny"],
    "colours of other channels": [*RUN, "data.channels=5"],
    "pixels of other channels": [*RUN, "crops.pixel_mean=[0.5]"],
    "stains on the device": [*RUN, "crops.hed_jitter=0.05", "crops.photometric=device"],
    "size that patches do not divide": [*RUN, "crops.local_crop_size=95"],
    "global size that patches do not divide": [*RUN, "crops.global_crop_size=223"],
    "evaluation size that patches do not divide": [*RUN, "eval.image_size=100"],
    "published positions elsewhere": [*CNN, "backbone.name=resnet10t", "backbone.pos_embed=official"],
    "no part of a backbone": [*RUN, "backbone.pretrained=true", "backbone.train=last(4)"],
    "blocks that there are not": [*RUN, "backbone.pretrained=true", "backbone.train=last_n(4)"],
    "rank above the width": [*RUN, "backbone.pretrained=true", "backbone.train=lora(17)"],
    "adapters without attention": [
        *(*CNN, "backbone.name=resnet10t", "backbone.pretrained=true", "backbone.train=lora(8)"),
    ],
    "frozen noise": [*RUN, "backbone.train=last_n(1)"],
    "indivisible batch": [*RUN, "train.global_batch_size=9", "resources.train_workers=2"],
    "more streams than train workers": [
        *(*RUN, "resources.train_workers=2", "train.global_batch_size=16"),
        "data.streams=3",
    ],
    "more streams than augment actors": [
        *(*RUN, "resources.train_workers=4", "train.global_batch_size=16"),
        *("resources.augment_actors=[1, 2]", "data.streams=4"),
    ],
    "evaluator that there is not": [*RUN, "resources.evaluator_cpus=2"],
    "indivisible share": [*RUN, "train.global_batch_size=16", "train.accumulate_steps=3"],
    "falling warm-up": [*RUN, "loss.teacher_temp=0.03", "loss.warmup_teacher_temp_epochs=5"],
    "momentum without a centre": [*RUN, "loss.center_momentum=0.5", "loss.centering=none"],
    "scale upside down": [*RUN, "crops.global_crop_scale=[0.9, 0.1]"],
    "scale above 1": [*RUN, "crops.local_crop_scale=[0.1, 2]"],
    "blur upside down": [*RUN, "crops.blur_sigma=[2, 1]"],
    "division by 0": [*RUN, "crops.pixel_std=[0, 1, 1]"],
    "too few probabilities": [*RUN, "crops.global_blur_prob=[0.5]"],
    "one crop": [
        *(*RUN, "crops.num_global_crops=1", "crops.num_local_crops=0"),
        *("crops.global_blur_prob=[1]", "crops.global_solarize_prob=[0]"),
    ],
    "too many probabilities": [*RUN, "crops.num_global_crops=1", "crops.global_blur_prob=[1]"],
    "actors from many to few": [*RUN, "resources.augment_actors=[3, 1]"],
}
STUDIES: dict[str, list[str]] = {
    "searched key": [*STUDY, "tune.space={loss.teacher_tempp: {log: [0.02, 0.1]}}"],
    "population's point outside": [
        *STUDY,
        TEMP,
        "tune.scheduler=pb2",
        "tune.first=[{loss.teacher_temp: 0.5}]",
    ],
    "more points than trials": ["tune.trials=1", TEMP, "tune.first=[{loss.teacher_temp: 0.03}]"],
    "k-NN without labels": [*STUDY, TEMP, "eval.val_path=null", "tune.objective=knn"],
    "loss that what varies is part of": [*STUDY, TEMP, "tune.objective=loss"],
    "batch under ASHA": [*STUDY, "tune.space={train.global_batch_size: [32, 64]}"],
    "shared stream of other crops": [*STUDY, "tune.space={crops.hue: [0.1, 0.2]}", "tune.share_stream=true"],
    "shared stream of several": [*STUDY, TEMP, "tune.share_stream=true", "data.streams=2"],
    "population that moves no setting": [
        *STUDY,
        "tune.space={head.out_dim: [64, 128]}",
        "tune.scheduler=pb2",
    ],
    "population with few evaluations": [*STUDY, TEMP, "tune.scheduler=pb2", "tune.evaluations=3"],
    "population one after another": [*STUDY, TEMP, "tune.scheduler=pb2", "tune.max_concurrent=2"],
    "population on a grid": [*STUDY, TEMP, "tune.scheduler=pb2", "tune.searcher=grid"],
}
PLANS: dict[str, list[str]] = {
    "GPU node without a GPU": [*PLAN, "plan.gpu_node=c6id.8xlarge"],
    "CPU node with GPUs": [*PLAN, "plan.cpu_node=g5.xlarge"],
    "unknown node": [*PLAN, "plan.head_node=t2.nano"],
    "no zone": [*PLAN, "plan.availability_zone=us-east-1"],
    "CPUs of train workers": [*PLAN, "resources.cpus_per_train_worker=13"],
    "CPUs of an actor": [*PLAN, "resources.cpus_per_augment_actor=99"],
    "figure that is missing": [word for word in PLAN if not word.startswith(("data.", "plan.latency"))],
}
CASES = [(kind, mistake) for kind in ("run", "study", "plan") for mistake in
         {"run": RUNS, "study": STUDIES, "plan": PLANS}[kind]]  # fmt: skip


def check(kind: str, words: list[str]) -> None:
    """All that a job checks of its command line before it looks at images or starts Ray."""
    if kind == "run":
        check_run(pretrain_config(PretrainArguments().parse_args(words)))
    elif kind == "study":
        config = study_config(StudyArguments().parse_args(words))
        space = space_of(config)
        objective_of(config, space)
        first_points(config, space)
    else:
        plan = plan_config(PlanArguments().parse_args(words))
        figures = Figures(250, 800, 1000, 1, 25)
        measured = Measured(figures, 1000, True, {})
        run = run_of(plan, measured)
        forecast(run, figures, plan.plan)
        other_sizes(plan, run, measured)


@cache
def message_of(kind: str, mistake: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(kind, {"run": RUNS, "study": STUDIES, "plan": PLANS}[kind][mistake])
    (line,) = str(caught.value).splitlines()
    return line


def put(words: list[str], key: str, value: str) -> list[str]:
    """The command line with another value for a key, or option."""
    if key == "recipe":
        return ["--recipe", value, *words[2:]]
    return [*(word for word in words if not word.startswith(f"{key}=")), f"{key}={value}"]


def follow(message: str, words: list[str]) -> list[str]:
    """The command line once the message's remedy is followed, its first where there are several."""
    subject = re.split(r"[=:]", message)[0]
    if near := re.search(r"did you mean ([\w.]+)", message):
        if subject in ("recipe", "backbone.name"):
            return put(words, subject, near[1])
        wrong = message.split(": ")[1] if subject == "tune.space" else subject
        return [word.replace(wrong, near[1]) for word in words]
    remedy = message.rpartition("; ")[2] if "; " in message else message
    if found := re.search(r"leave (?:out (\w+)|it out|them out)", remedy.partition(", or")[0]):
        if found[1] is None:  # what is searched, or the setting that the message begins with
            if subject in ("tune.space", "tune.scheduler", "tune.share_stream"):
                return put(words, "tune.space", TEMP.partition("=")[2])
            return [word for word in words if not word.startswith(f"{subject}=")]
        bare = re.sub(rf"{found[1]}: [^,}}]+(, )?", "", " | ".join(words)).split(" | ")
        return [
            word for word in bare if not word.startswith((f"backbone.{found[1]}=", f"{subject}.{found[1]}="))
        ]
    if tried := re.search(r"try (\d+)", remedy):
        return put(words, subject, tried[1])
    asked = re.search(r"\b(?:set|take|choose|e\.g\.|add it:?) (.*)", remedy)
    setting = r"([a-z_]+(?:\.[a-z_]+)+|name)=(\{.*\}|\[[^]]*\]|\w+\(\d+\)|[\w./:-]+)"
    if settings := re.findall(setting, asked[1] if asked else ""):
        chosen = (
            settings
            if remedy.startswith("set ") and " or " not in remedy and "," not in remedy
            else settings[:1]
        )
        for key, value in chosen:
            words = put(words, key, value)
        refused = re.match(r"override '(.*?)'", message)
        wrong = refused[1] if refused else f"{subject}=" if "unknown key" in message else None
        return [
            word for word in words if wrong is None or not (word == wrong or word.startswith(f"{subject}="))
        ]
    if listed := re.search(r"e\.g\. (\[[^]]*\])", message):
        return put(words, subject, listed[1])
    if choice := re.search(r"take ([\w.]+)", remedy):
        return put(words, subject, choice[1])
    if default := re.search(r"\(default (.*)\)$", message):
        return put(words, subject, default[1].strip('"'))
    if missing := re.search(r"must be set, or else set ([\w.]+) too", message):
        return put(words, missing[1], "25")
    raise AssertionError(f"no remedy can be read from: {message}")


@pytest.mark.parametrize(("kind", "mistake"), CASES)
def test_following_the_remedy_ends_the_error(kind: str, mistake: str) -> None:
    message = message_of(kind, mistake)
    words = {"run": RUNS, "study": STUDIES, "plan": PLANS}[kind][mistake]
    remedied = follow(message, words)
    assert remedied != words, message
    check(kind, remedied)


CHECKED_HERE = {
    "models/backbone.py": {
        "optim.layer_decay needs a backbone",  # no timm network lacks what it asks for
        "which are for three channels, do not fit",  # needs weights: tests/pipeline/training/test_timm_start.py
    },
    "models/loss.py": set(),
    "pipeline/augment/config.py": set(),
    "pipeline/planning/forecast.py": set(),
    "pipeline/data/partition.py": set(),
    "pipeline/planning/prices.py": {"is new and lacks"},  # the figures of a node are its owner's
    "pipeline/cluster/resources.py": set(),
    "pipeline/study/objective.py": set(),
}
"""Files that refuse settings by themselves -> messages in them that no command line here brings about, and why."""


def constant_parts(node: ast.AST) -> list[str]:
    return [
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


@pytest.mark.parametrize("file", CHECKED_HERE)
def test_each_refusal_of_these_files_is_among_the_mistakes(file: str) -> None:
    messages = [message_of(*case) for case in CASES]
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        if ast.unparse(node.exc.func) not in ("ConfigError", "ValueError"):
            continue
        longest = max(constant_parts(node.exc.args[0]), key=len)
        if not any(known in longest or longest in known for known in CHECKED_HERE[file]):
            assert any(longest in message for message in messages), f"{file}:{node.lineno}: {longest}"
