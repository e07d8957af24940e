"""The optimiser of a published checkpoint: each parameter gets its moments back, or none that are another's."""

from typing import Any

import pytest
import torch
from published import Run, ViT
from published_twins import assert_same_moments, dino, moments, optimizer_of, read, reordered

from dinoray.models.published.checkpoint import load, load_optimizer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("norm_last_layer", [True, False])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_the_optimiser_remembers_each_parameter_as_the_published_one_did(
    name: str, norm_last_layer: bool
) -> None:
    run = Run(optimizer=name, norm_last_layer=norm_last_layer).train()
    ours = dino(norm_last_layer=norm_last_layer)
    load(ours, weights := read(run.state()))
    optimizer = optimizer_of(ours, name=name)
    num_parameters = sum(p.requires_grad for p in ours.student.parameters())
    assert load_optimizer(optimizer, ours.student, weights.optimizer) == (num_parameters, 0)
    assert_same_moments(moments(optimizer, ours.student), moments(run.optimizer, run.networks[0]))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_the_next_step_is_that_of_the_published_optimiser(name: str) -> None:
    run, ours = Run(optimizer=name).train(), dino()
    load(ours, weights := read(run.state()))
    optimizer = optimizer_of(ours, name=name)
    load_optimizer(optimizer, ours.student, weights.optimizer)
    for group in (*optimizer.param_groups, *run.optimizer.param_groups):
        group |= {"lr": 0.01, "weight_decay": 0.1}
    theirs = run.networks[0]
    for network in (ours.student, theirs):
        for k, p in network.named_parameters():
            if p.requires_grad:
                p.grad = torch.full_like(p, 0.1 + 0.01 * len(k))
    optimizer.step()
    run.optimizer.step()
    for k, p in theirs.named_parameters():
        torch.testing.assert_close(ours.student.get_parameter(k), p)


def test_moments_find_their_parameters_when_blocks_have_rates_of_their_own() -> None:
    run, ours = Run().train(), dino()
    load(ours, weights := read(run.state()))
    optimizer = optimizer_of(ours, layer_decay=0.5)
    assert len(optimizer.param_groups) > 2
    assert load_optimizer(optimizer, ours.student, weights.optimizer)[1] == 0
    assert_same_moments(moments(optimizer, ours.student), moments(run.optimizer, run.networks[0]))


@pytest.mark.parametrize("theirs", [True, False])
def test_whether_the_magnitude_was_learnt_does_not_shift_the_others(theirs: bool) -> None:
    run, ours = Run(norm_last_layer=theirs).train(), dino(norm_last_layer=not theirs)
    load(ours, weights := read(run.state()))
    optimizer = optimizer_of(ours)
    _, fresh = load_optimizer(optimizer, ours.student, weights.optimizer)
    magnitude = "head.last_layer.weight_g"
    assert fresh == (1 if theirs else 0)
    expected = {k: v for k, v in moments(run.optimizer, run.networks[0]).items() if k != magnitude}
    assert_same_moments(moments(optimizer, ours.student), expected)


@pytest.mark.parametrize("theirs", [{"out_dim": 64}, {"num_layers": 2}, {"use_bn": True}])
def test_of_another_head_the_backbone_s_moments_are_restored_alone(theirs: dict[str, Any]) -> None:
    run, ours = Run(**theirs).train(), dino()
    weights = read(run.state())
    load(ours, weights, backbone_only=True)
    optimizer = optimizer_of(ours)
    restored, fresh = load_optimizer(optimizer, ours.student, weights.optimizer)
    expected = moments(run.optimizer, run.networks[0])
    ours_now = moments(optimizer, ours.student)
    body = {k: v for k, v in expected.items() if k.startswith("backbone.")}
    assert_same_moments({k: v for k, v in ours_now.items() if k.startswith("backbone.")}, body)
    assert restored == len(ours_now) >= len(body)
    assert restored + fresh == sum(p.requires_grad for p in ours.student.parameters())
    for k, state in ours_now.items():
        assert state["exp_avg"].shape == ours.student.get_parameter(k).shape


def test_prototypes_that_were_frozen_all_along_start_fresh() -> None:
    run, ours = Run().train(), dino()
    state = run.state()
    del state["optimizer"]["state"][_number(run, "head.last_layer.weight_v")]
    load(ours, weights := read(state))
    optimizer = optimizer_of(ours)
    assert load_optimizer(optimizer, ours.student, weights.optimizer)[1] == 1
    assert "head.last_layer.weight_v" not in moments(optimizer, ours.student)


def _number(run: Run, name: str) -> int:
    wanted = run.networks[0].get_parameter(name)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    return next(i for i, p in enumerate(parameters) if p is wanted)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("adamw", "sgd"), ("sgd", "adamw"), ("lars", "sgd"), ("sgd", "lars"), ("adamw", "lars")],
)
def test_another_optimiser_s_moments_are_not_taken_for_its_own(theirs: str, ours: str) -> None:
    run, networks = Run(optimizer=theirs).train(), dino()
    optimizer = optimizer_of(networks, name=ours)
    restored, fresh = load_optimizer(optimizer, networks.student, read(run.state()).optimizer)
    assert (restored, fresh) == (0, sum(p.requires_grad for p in networks.student.parameters()))
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("backbone", [lambda: ViT(depth=3), lambda: ViT(depth=1), lambda: ViT(dim=48)])
def test_another_backbone_s_moments_are_not_taken_even_where_shapes_agree(backbone: Any) -> None:
    run, ours = Run(backbone=backbone).train(), dino()
    optimizer = optimizer_of(ours)
    assert load_optimizer(optimizer, ours.student, read(run.state()).optimizer)[0] == 0
    assert not any(optimizer.state.values())


def test_steps_that_old_files_count_in_plain_numbers_are_read() -> None:
    run, ours = Run().train(steps=3), dino()
    state = run.state()
    for moment in state["optimizer"]["state"].values():
        moment["step"] = int(moment["step"])
    optimizer = optimizer_of(ours)
    load_optimizer(optimizer, ours.student, read(state).optimizer)
    assert {float(m["step"]) for m in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_moments_follow_the_order_of_the_file_s_own_network(norm_last_layer: bool) -> None:
    state, ours = reordered(Run().train().state()), dino(norm_last_layer=norm_last_layer)
    weights, optimizer = read(state), optimizer_of(ours)
    load_optimizer(optimizer, ours.student, weights.optimizer, weights.student)
    numbers = [
        *(k for k, v in state["student"].items() if v.ndim > 1),
        *(k for k, v in state["student"].items() if v.ndim == 1),
    ]
    found = moments(optimizer, ours.student)
    assert found.keys() == {k for k, p in ours.student.named_parameters() if p.requires_grad}
    for name, own in found.items():
        saved = state["optimizer"]["state"][numbers.index(f"module.{name}")]
        assert torch.equal(own["exp_avg"], saved["exp_avg"]), name
