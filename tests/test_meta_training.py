"""Offline training: regret curves, the regression on them, and the resumable command."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import network_saying
from torch.nn import functional as F

from hf_alrs import meta_training
from hf_alrs.config import InputError
from hf_alrs.features import FEATURE_NAMES
from hf_alrs.meta_training import training
from hf_alrs.meta_training.bank import Group, group_path, load_group, run_group, save_group
from hf_alrs.meta_training.command import meta_evaluate_command, read_config
from hf_alrs.meta_training.evaluation import evaluate_group, summarize
from hf_alrs.meta_training.population import Population
from hf_alrs.meta_training.spec import TaskSpec, sample_spec
from hf_alrs.meta_training.training import (
    MetaTrainingConfig,
    States,
    _keep_configuration,
    _last_networks,
    _refuse_trained_on,
    _weighted_states,
    distill,
    fit,
    meta_train,
    regret_at,
    visit,
)
from hf_alrs.network import MetaLRNetwork, load_network


@pytest.fixture
def group() -> Group:
    """
    One task with two classes and a grid of four rates; chance is a loss of ln 2 and an error of 0.5. With averaging the
    best run is better still, and the second one worse.
    """
    chance = math.log(2)
    return Group(
        spec=replace(sample_spec(0, 1.0), num_classes=2),
        log_rates=torch.tensor([-4.0, -3.0, -2.0, -1.0]),
        loss=torch.tensor([[chance, chance / 2, chance / 4, 5.0]]),
        error=torch.tensor([[0.5, 0.3, 0.1, 0.5]]),
        averaged_loss=torch.tensor([[chance, chance / 2, chance / 8, 5.0]]),
        averaged_error=torch.tensor([[0.5, 0.4, 0.08, 0.5]]),
        initial=[],
    )


def test_regret_is_0_for_the_best_run_and_1_for_chance(group: Group) -> None:
    # half-way: loss excess (1/2 - 1/4) / (3/4) = 1/3, error excess (0.3 - 0.1) / 0.4 = 1/2; their mean is 5/12.
    # diverged: the loss is capped at 2 ln 2 + 1, its excess is over 1.5 and is cut there; the error is chance.
    annealed = group.regret(group.loss, group.error)
    torch.testing.assert_close(annealed, torch.tensor([[1.0, 5 / 12, 0.0, 1.25]]))
    # Of averaged runs, by the same scale: error excess (0.4 - 0.1) / 0.4 = 3/4 with the loss's 1/3; below 0 where
    # averaging is better than the best annealed run, (1/8 - 1/4) / (3/4) = -1/6 and (0.08 - 0.1) / 0.4 = -1/20.
    expected = torch.tensor([[1.0, (1 / 3 + 3 / 4) / 2, (-1 / 6 - 1 / 20) / 2, 1.25]])
    torch.testing.assert_close(group.grid_regret, expected)


def test_curve_is_smoothed_and_weight_grows_with_what_can_be_learnt(group: Group) -> None:
    a, b, c, d = 1.0, 13 / 24, -13 / 120, 1.25
    expected = [0.75 * a + 0.25 * b, 0.25 * a + 0.5 * b + 0.25 * c, 0.25 * b + 0.5 * c + 0.25 * d, 0.25 * c + 0.75 * d]
    torch.testing.assert_close(group.curve, torch.tensor([expected]))
    assert group.weight.tolist() == [1.0]  # gains 3/4 of the loss at chance, over 0.4
    weak = replace(group, loss=torch.full((1, 4), 0.95 * math.log(2)))
    assert weak.weight.tolist() == [0.0]


def test_regret_between_and_beyond_the_points_of_the_grid() -> None:
    curves = torch.tensor([[1.0, 0.0, 2.0]]).expand(4, -1)
    origins = torch.full((4,), -2.0)
    read = regret_at(curves, origins, 1.0, torch.tensor([-2.0, -1.5, -0.5, -4.0]))
    torch.testing.assert_close(read, torch.tensor([1.0, 0.5, 1.0, 1.0 + 0.1 * 2]))


def states_told_by(*told_by: int) -> tuple[States, torch.Tensor]:
    """States whose features `told_by` say how far the rate is from the best one, and that distance."""
    torch.manual_seed(0)
    offsets = torch.empty(4000).uniform_(-3, 3)
    features = torch.zeros(4000, len(FEATURE_NAMES))
    features[:, told_by] = offsets[:, None]
    grid = torch.linspace(-5, -0.5, 16) * math.log(10)
    best = grid[8]
    states = States(
        features=features.half(),
        log_rates=best + offsets,
        curves=((grid - best) / 5).square().expand(4000, -1),
        origins=torch.full((4000,), float(grid[0])),
        weights=torch.ones(4000),
    )
    return states, offsets


def test_fit_learns_to_ask_for_the_best_rate() -> None:
    states, offsets = states_told_by(0)
    network = MetaLRNetwork()
    fit(network, states, num_iterations=300, batch_size=256, learning_rate=3e-3, seed=0)
    with torch.no_grad():
        error = (network.correction(states.features.float()) + offsets).abs().mean()
    assert error < 0.3, f"expected a correction of minus the offset, off by {error:.2f}"


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ({"feature_noise": {FEATURE_NAMES[0]: 50.0}}, [(-0.1, 0.1), (0.9, 1.1)]),
        ({"feature_dropout": 0.5}, [(0.35, math.inf), (0.35, math.inf)]),
    ],
    ids=["noise", "dropout"],
)
def test_fit_does_not_rest_on_a_feature_that_is_noisy_or_missing(
    options: dict[str, Any], bounds: list[tuple[float, float]]
) -> None:
    """Two features tell the same; what the network makes of one with the other one at 0 is its share."""
    states, offsets = states_told_by(0, 1)
    network = MetaLRNetwork()
    fit(network, states, num_iterations=600, batch_size=256, learning_rate=3e-3, seed=0, **options)
    for feature, (low, high) in enumerate(bounds):
        alone = torch.zeros(4000, len(FEATURE_NAMES))
        alone[:, feature] = offsets
        with torch.no_grad():
            corrections = network.correction(alone)
        share = -(corrections * offsets).sum() / offsets.square().sum()
        assert low <= share <= high


def test_distillation_gives_the_mean_of_the_teachers() -> None:
    torch.manual_seed(0)
    states = States(
        features=torch.randn(500, len(FEATURE_NAMES)).half(),
        log_rates=torch.zeros(500),
        curves=torch.zeros(500, 16),
        origins=torch.zeros(500),
        weights=torch.ones(500),
    )
    network = MetaLRNetwork((8,))
    loss = distill(network, [network_saying(1.0), network_saying(3.0)], states, 400, 128, 1e-2, seed=0)
    assert loss < 0.01
    with torch.no_grad():
        said = network.correction(states.features.float())
    assert said.mean() == pytest.approx(2.0, abs=0.1)


def test_earlier_networks_teach_with_their_share() -> None:
    torch.manual_seed(0)
    features = torch.randn(500, len(FEATURE_NAMES))
    features[:250, 0], features[250:, 0] = 3, -3  # so that the network can tell the halves apart
    states = States(features.half(), torch.zeros(500), torch.zeros(500, 16), torch.zeros(500), torch.ones(500))
    shares = torch.cat([torch.zeros(250), torch.full((250,), 0.75)])
    network = MetaLRNetwork((8,))
    distill(network, [network_saying(1.0)], states, 800, 128, 1e-2, 0, network_saying(3.0), shares)
    with torch.no_grad():
        said = network.correction(states.features.float())
    assert said[:250].mean() == pytest.approx(1.0, abs=0.1)
    assert said[250:].mean() == pytest.approx(1.0 * 0.25 + 3.0 * 0.75, abs=0.1)


def test_long_groups_have_seeds_of_their_own() -> None:
    config = MetaTrainingConfig(output_dir="x", num_groups=3, num_held_out_groups=2, num_long_groups=2,
                                num_held_out_long_groups=1, seed=5)  # fmt: skip
    assert list(config.held_out_seeds[""]) == [5, 6]
    assert list(config.held_out_seeds["long"]) == [100_005]
    assert config.train_seeds == [7, 8, 9, 100_006, 100_007]
    assert config.size_of(7) == (4, 4.0)
    assert config.size_of(100_006) == (2, 16.0)
    specs = [sample_spec(seed, 16.0) for seed in range(100_000, 100_040)]
    assert max(spec.num_training_steps for spec in specs) > 800
    assert sum(spec.pretrained for spec in specs) > 20


@pytest.mark.parametrize(
    ("part", "start", "size"),
    [
        ("extended", 200_000, (2, 24.0)),
        ("short", 300_000, (2, 3.0)),
        ("large", 400_000, (1, 60.0)),
        ("brief", 500_000, (1, 40.0)),
        ("batch", 600_000, (2, 24.0)),
    ],
)
def test_parts_have_seeds_and_sizes_of_their_own(part: str, start: int, size: tuple[int, float]) -> None:
    numbers = {f"num_{part}_groups": 2, f"num_held_out_{part}_groups": 1}
    config = MetaTrainingConfig(output_dir="x", num_groups=1, num_held_out_groups=1, seed=5, **numbers)
    assert list(config.held_out_seeds[part]) == [start + 5]
    assert config.train_seeds == [6, start + 6, start + 7]
    assert config.size_of(start + 6) == size


def test_extended_groups_reach_many_epochs() -> None:
    specs = [sample_spec(seed, 24.0) for seed in range(200_000, 200_060)]
    assert min(spec.num_training_steps for spec in specs) >= 400
    epochs = [s.num_training_steps * s.batch_size / s.num_examples for s in specs if not s.pretrained]
    assert sum(e > 40 for e in epochs) >= 8
    assert "attention" not in {spec.kind for spec in specs}


def test_short_groups_have_a_few_dozen_steps() -> None:
    specs = [sample_spec(seed, 3.0) for seed in range(300_000, 300_100)]
    assert 20 <= min(spec.num_training_steps for spec in specs) <= 30
    assert max(spec.num_training_steps for spec in specs) <= 160
    assert any(spec.batch_norm and spec.optimizer == "sgd" and spec.kind == "conv" for spec in specs)
    assert any(spec.pretrained and spec.kind == "attention" for spec in specs)
    assert not any(spec.data == "sequence" and not spec.pretrained for spec in specs)


def test_large_groups_are_wide_or_deep() -> None:
    specs = [sample_spec(seed, 60.0) for seed in range(400_000, 400_200)]
    assert {spec.kind for spec in specs} == {"mlp", "conv", "attention"}
    assert max(spec.hidden for spec in specs) > 400 and max(spec.depth for spec in specs) == 12
    assert all(spec.hidden >= 64 for spec in specs if spec.kind == "attention")
    deep = [spec for spec in specs if spec.depth >= 3 and not (spec.batch_norm or spec.layer_norm)]
    assert all(spec.residual for spec in deep)
    assert not any(spec.residual and spec.batch_norm for spec in specs if spec.kind == "mlp")
    assert sum(s.kind == "conv" and s.batch_norm and s.optimizer.startswith("sgd") for s in specs) >= 20


def test_brief_groups_are_large_ones_in_few_steps() -> None:
    specs = [sample_spec(seed, 40.0) for seed in range(500_000, 500_200)]
    assert 20 <= min(spec.num_training_steps for spec in specs) <= 22
    assert max(spec.num_training_steps for spec in specs) <= 80
    conv = [spec for spec in specs if spec.kind == "conv"]
    assert all((spec.depth >= 14) == bool(spec.seed % 2) for spec in conv)
    assert min(spec.hidden for spec in conv) >= 16 and max(spec.hidden for spec in conv) > 48
    assert sum(spec.batch_norm and spec.optimizer.startswith("sgd") for spec in conv) >= 40
    assert not any(spec.data == "sequence" and not spec.pretrained for spec in specs)


def test_batch_groups_have_large_and_accumulated_batches_and_any_decay() -> None:
    specs = [sample_spec(seed, 24.0) for seed in range(600_000, 600_200)]
    assert {spec.kind for spec in specs} == {"mlp", "conv", "bag", "rnn", "attention"}
    assert {spec.batch_size for spec in specs} == {128, 256, 512}
    assert {spec.gradient_accumulation_steps for spec in specs} == {1, 2, 4, 8}
    decays = {(spec.optimizer, spec.weight_decay) for spec in specs}
    assert {("adamw", 0.0), ("adamw", 0.1), ("adam", 0.0), ("adam", 5e-4), ("sgd", 0.0), ("sgd", 5e-4)} <= decays
    assert all(40 <= spec.num_training_steps <= 400 for spec in specs)
    assert all(spec.num_training_steps * spec.batch_size / spec.num_examples <= 101 for spec in specs)


@pytest.mark.parametrize(("depth", "size"), [(4, 12), (6, 8), (7, 8), (12, 12)])
def test_deep_conv_nets_halve_their_images_three_times_in_all(depth: int, size: int) -> None:
    spec = TaskSpec(seed=0, kind="conv", data="images", num_training_steps=2, batch_size=4, num_examples=8,
                    optimizer="sgd", hidden=2, depth=depth, image_size=size)  # fmt: skip
    population = Population(spec, 1, 1)
    sizes: list[int] = []
    pool = F.max_pool2d

    def watched(x: torch.Tensor, kernel: int) -> torch.Tensor:
        y = pool(x, kernel)
        sizes.append(y.shape[-1])
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "max_pool2d", watched)
        population.loss_and_gradient(0)
    assert sizes == [size // 2, size // 4, size // 8][: 2 if depth == 4 else 3]


def test_the_groups_of_the_first_version_stay_as_they_were() -> None:
    """The bank of short and long groups is hours of work."""
    drawn = [sample_spec(seed, 5.0) for seed in (0, 1, 100_000)]
    assert [(s.kind, s.data, s.num_training_steps, s.num_examples, s.optimizer) for s in drawn] == [
        ("attention", "sequence", 112, 300, "adamw"),
        ("bag", "topics", 334, 6000, "sgd"),
        ("mlp", "digits", 479, 1152, "adam"),
    ]


def test_transformers_mostly_have_separate_projections_and_many_unused_tokens() -> None:
    specs = [spec for seed in range(600) if (spec := sample_spec(seed, 5.0)).kind == "attention"]
    assert 0.6 < sum(spec.separate_projections for spec in specs) / len(specs) < 0.9
    assert any(spec.pooler for spec in specs) and all(spec.pool == "first" for spec in specs if spec.pooler)
    fine_tuned = [spec for spec in specs if spec.pretrained and spec.data in ("topics", "sequence")]
    assert 0.4 < sum(spec.unused_tokens > 0 for spec in fine_tuned) / len(fine_tuned) < 0.8


def test_training_groups_need_no_annealed_runs() -> None:
    full, averaged = run_group(3, 1, 1.0), run_group(3, 1, 1.0, annealed=False)
    torch.testing.assert_close(full.averaged_loss, averaged.averaged_loss)
    assert torch.equal(averaged.loss, averaged.averaged_loss) and not torch.equal(full.loss, full.averaged_loss)
    assert averaged.grid_regret.min() >= 0.0  # of the best averaged run: 0 in loss or in error


def test_the_rates_of_a_group_are_judged_with_the_decay_of_its_length() -> None:
    """A run of a few dozen steps decays less: 0.7 instead of 0.3 up to 35."""
    seed = next(s for s in range(300_000, 300_100) if sample_spec(s, 1.0).num_training_steps <= 35)
    group = run_group(seed, 1, 1.0, annealed=False)
    population = group.population(16)
    expected, _ = population.run_fixed(group.log_rates, 0.7, average=True)
    torch.testing.assert_close(group.averaged_loss[0], expected)
    other, _ = population.run_fixed(group.log_rates, 0.3, average=True)
    assert not torch.equal(other, expected)


def test_a_group_survives_its_file(tmp_path: Path) -> None:
    group = run_group(3, num_tasks=1, max_cost=1.0)
    save_group(group, group_path(tmp_path, 3))
    again = load_group(group_path(tmp_path, 3))
    assert again.spec == group.spec
    population = again.population(16)
    for name, options in (("", {}), ("averaged_", {"final_ratio": 0.3, "average": True})):
        for kind, got in zip(("loss", "error"), population.run_fixed(group.log_rates, **options), strict=True):
            stored = getattr(group, f"{name}{kind}")
            torch.testing.assert_close(getattr(again, f"{name}{kind}"), stored)
            torch.testing.assert_close(got.view(1, 16), stored)
    assert not torch.equal(group.averaged_loss, group.loss)


def test_summary_is_weighted_over_tasks_that_can_be_learnt() -> None:
    table = summarize(
        [
            {"regret": [[0.1, 0.3], [9.0, 9.0]], "weight": [1.0, 0.0], "restarts": 1.0},
            {"regret": [[0.4, 0.6]], "weight": [0.5], "restarts": 0.0},
        ]
    )
    np.testing.assert_allclose(table["regret_by_initial_rate"], [0.2, 0.4])
    assert table["mean_regret"] == pytest.approx(0.3)
    assert (table["num_tasks"], table["num_groups"], table["mean_restarts"]) == (2, 2, 0.5)
    # (0.2 - 0.3) * 1 and (0.5 - 0.3) * 0.5 deviate; over the total weight of 1.5, with two of one degree of freedom
    assert table["standard_error"] == pytest.approx((2 * (0.1**2 + 0.1**2)) ** 0.5 / 1.5)


def test_a_summary_says_what_it_cannot_know() -> None:
    alone = summarize([{"regret": [[0.1, 0.3]], "weight": [1.0], "restarts": 1.0}])
    assert alone["standard_error"] is None, "one group says nothing about others"
    with pytest.raises(InputError, match=r"num_groups=1: in none of the held-out groups"):
        summarize([{"regret": [[9.0, 9.0]], "weight": [0.0], "restarts": 1.0}])


def test_networks_are_distilled_from_one_round_of_states_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a part whose held-out tasks cannot be learnt is left out of the card."""
    config = MetaTrainingConfig(str(tmp_path), num_groups=1, num_held_out_groups=1, num_tasks=1, num_members=1,
                                num_rounds=1, num_iterations=3, num_distillation_iterations=3, batch_size=8,
                                num_short_groups=1, num_held_out_short_groups=1, hidden_sizes=[[4]], max_cost=1.0,
                                max_short_cost=1.0, num_workers=1, seed=3,
                                ensemble=[{"hidden_sizes": [4], "seed": 1, "num_iterations": 3}])  # fmt: skip

    def judged(bank: Path, seeds: list[int], network: Path, num_workers: int) -> dict[str, Any]:
        return summarize(
            [{"regret": [[0.1, 0.3]], "weight": [float(seed == config.seed)], "restarts": 0.0} for seed in seeds]
        )

    monkeypatch.setattr(training, "evaluate_held_out", judged)
    report = meta_train(config)
    assert report["4"]["mean_regret"] == pytest.approx(0.2)
    assert report["4-short"] == {"num_tasks": 0, "num_groups": 1}
    card = (tmp_path / "4" / "README.md").read_text()
    assert "1 held-out tasks:" in card and "of few steps" not in card
    monkeypatch.undo()
    group_path(tmp_path / "bank", config.seed).write_bytes(b"cut")
    with pytest.raises(InputError, match=r"group-000003.pt.*cannot be read"):
        meta_train(config)
    assert (tmp_path / "4" / "README.md").read_text() == card


def test_a_network_is_judged_on_seeds_of_ones_choice_and_nothing_twice(tmp_path: Path) -> None:
    arguments = ["--first_seed", "5", "--num_groups", "2", "--num_tasks", "1", "--max_cost", "1"]
    arguments += ["--output_dir", str(tmp_path)]
    meta_evaluate_command(arguments, lambda: {"commit": "abc"})
    report = json.loads((tmp_path / "report-64-32-5-2.json").read_text())
    outcomes = sorted(tmp_path.glob("bank-*/network-*/group-*.json"))
    assert [path.name for path in outcomes] == ["group-5.json", "group-6.json"]
    assert report["table"] == summarize([json.loads(path.read_text()) for path in outcomes])
    assert len(report["table"]["regret_by_initial_rate"]) == 16
    assert (report["first_seed"], report["environment"]) == (5, {"commit": "abc"})
    assert report["network"]["sha256"].startswith(outcomes[0].parent.name.split("-")[1])

    before = [path.stat().st_mtime_ns for path in tmp_path.rglob("group-*")]
    meta_evaluate_command(arguments, lambda: {"commit": "abc"})
    assert [path.stat().st_mtime_ns for path in tmp_path.rglob("group-*")] == before
    meta_evaluate_command([*arguments, "--max_cost", "1.5"], dict)  # other groups: outcomes are not theirs
    assert len(list(tmp_path.rglob("group-5.json"))) == 2

    with pytest.raises(InputError, match="num_groups"):
        meta_evaluate_command([*arguments, "--num_groups", "0"], dict)
    with pytest.raises(InputError, match="max_cost"):
        meta_evaluate_command([*arguments, "--max_cost", "0.5"], dict)
    with pytest.raises(InputError, match="of two parts of the population"):
        meta_evaluate_command([*arguments, "--first_seed", "99999"], dict)
    with pytest.raises(InputError, match="seeds from 0 to 699,999"):
        meta_evaluate_command([*arguments, "--first_seed", str(10**20)], dict)

    meta_evaluate_command([*arguments, "--no_choose_average"], dict)
    assert json.loads((tmp_path / "report-64-32-5-2-fixed-average.json").read_text())["choose_average"] is False
    assert len(list(tmp_path.rglob("group-5.json"))) == 3
    meta_evaluate_command([*arguments, "--max_beta1", "1"], dict)
    lowered = json.loads((tmp_path / "report-64-32-5-2.json").read_text())["table"]["mean_regret"]
    own = json.loads((tmp_path / "report-64-32-5-2-beta1-1.0.json").read_text())
    assert own["max_beta1"] == 1.0
    assert own["table"]["mean_regret"] != lowered, "one of the groups is trained by Adam"
    assert len(list(tmp_path.rglob("group-5.json"))) == 4


def test_states_of_a_part_count_as_much_as_the_configuration_says(tmp_path: Path) -> None:
    states = States(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 4), torch.zeros(2), torch.tensor([1.0, 0.5]))
    paths = [tmp_path / f"round0-{seed:06d}.pt" for seed in (7, 400_007)]
    for path in paths:
        torch.save(asdict(states), path)
    config = MetaTrainingConfig(output_dir="x", part_weights={"large": 3})
    assert _weighted_states(config, paths).weights.tolist() == [1.0, 0.5, 3.0, 1.5]


def test_a_bad_configuration_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(InputError, match="not a file"):
        read_config(path)
    path.write_text("output_dir: x\nnum_gruops: 3\n")
    with pytest.raises(InputError, match="num_gruops"):
        read_config(path)
    path.write_text("output_dir: x\nensemble: [{seed: 1}]\n")
    with pytest.raises(InputError, match="num_iterations"):
        read_config(path)
    member = "output_dir: x\nensemble: [{hidden_sizes: [8], seed: 1, num_iterations: 2, feature_noise: {epoch: 1}}]\n"
    path.write_text(member)
    with pytest.raises(InputError, match=r"feature_noise=\{'epoch': 1\}.*epochs"):
        read_config(path)
    path.write_text(member.replace("feature_noise: {epoch: 1}", "feature_dropout: 2"))
    with pytest.raises(InputError, match="feature_dropout=2"):
        read_config(path)
    for line, match in (
        ("earlier_networks: [nowhere]", "earlier_networks='nowhere'"),
        ("earlier_shares: {short: 2}", r"earlier_shares=\{'short': 2\}.*from 0 to 1"),
        ("earlier_shares: {quick: 0.5}", "standard, long, extended, short, large, brief, batch"),
        ("part_weights: {large: -1}", r"part_weights=\{'large': -1\}.*at least 0"),
        ("part_weights: {wide: 2}", "part_weights=.*standard, long, extended, short, large, brief, batch"),
        ("batch_size: 0", "batch_size=0"),
        ("num_distillation_iterations: 0", "num_distillation_iterations=0"),
        ("num_workers: 0", "num_workers=0"),
        ("ensemble: [{hidden_sizes: [8], seed: 0, num_iterations: 0}]", "num_iterations.*at least 1"),
        ("ensemble: [{hidden_sizes: [], seed: 0, num_iterations: 5}]", "hidden_sizes.*at least 1"),
        ("hidden_sizes: [[64, 32], [5000]]", r"hidden_sizes=\[5000\].*at most 4096"),
        ("ensemble: [{hidden_sizes: [5000], seed: 0, num_iterations: 5}]", r"hidden_sizes=\[5000\]"),
        ("max_cost: 0.05", "max_cost=0.05.*at least 1"),
        ("max_short_cost: 0.5", "max_short_cost=0.5"),
        ("seed: -20", "seed=-20"),
        ("seed: 100000", "num_groups=400: a part has the seeds below 100,000"),
        ("num_long_groups: 100001", "num_long_groups=100001"),
    ):
        path.write_text(f"output_dir: x\n{line}\n")
        with pytest.raises(InputError, match=match):
            read_config(path)
    path.write_text("output_dir: x\nstates_from: [nowhere]\n")
    with pytest.raises(InputError, match="nowhere"):
        read_config(path)
    path.write_text("output_dir: x\nfeature_noise: {epoch: 0.5}\n")
    with pytest.raises(InputError, match=r"feature_noise.*epochs"):
        read_config(path)
    path.write_text("output_dir: x\nfeature_dropout: 1\n")
    with pytest.raises(InputError, match="feature_dropout"):
        read_config(path)
    path.write_text("output_dir: x\nnum_groups: 0\n")
    with pytest.raises(InputError, match="num_groups"):
        read_config(path)


def test_another_configuration_does_not_go_on_with_what_one_has_made(tmp_path: Path) -> None:
    config = MetaTrainingConfig(str(tmp_path / "first"), num_groups=2, num_held_out_groups=1)
    states = tmp_path / "first" / "states"
    states.mkdir(parents=True)
    _keep_configuration(config)
    _keep_configuration(replace(config, num_workers=1))
    with pytest.raises(
        InputError, match=r"num_iterations=7: .*first holds what was made with 6000.*another output_dir"
    ):
        meta_train(replace(config, num_iterations=7))
    for seed in config.train_seeds:
        (states / f"round0-{seed:06d}.pt").touch()
    second = replace(config, output_dir=str(tmp_path / "second"), states_from=[str(tmp_path / "first")])
    _refuse_trained_on(list(second.held_out_seeds[""]), second.states_from)
    with pytest.raises(InputError, match=r"states_from=.*was trained on group 1, which is held out here"):
        meta_train(replace(second, num_held_out_groups=2))
    assert not (tmp_path / "second").exists()
    written = tmp_path / "first" / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"control_version": 3}))
    with pytest.raises(
        InputError, match=r"states_from=.*was made with control_version 3, and this is \d+\..*Leave it out"
    ):
        meta_train(second)
    assert not (tmp_path / "second").exists()
    for damaged in ('{"num_groups": 2', "3"):
        (tmp_path / "first" / "config.json").write_text(damaged)
        with pytest.raises(InputError, match=r"output_dir=.*its config\.json.* is damaged.*Restore that file"):
            _keep_configuration(config)
        with pytest.raises(InputError, match=r"states_from=.*its config\.json.* cannot be read"):
            meta_train(second)


def test_the_last_networks_are_whole_ones(tmp_path: Path) -> None:
    (tmp_path / "states").mkdir()
    for name in ("network-round2-64-32", "network-round10-64-32", "network-round10-64-64", "network-round10-old.bak"):
        network_saying(1.0).save_pretrained(tmp_path / name)
    (tmp_path / "network-round11-64-32").mkdir()
    assert [path.name for path in _last_networks(tmp_path)] == ["network-round10-64-32", "network-round10-64-64"]
    member = {"hidden_sizes": [4], "seed": 0, "num_iterations": 1}
    empty = tmp_path / "other"
    (empty / "states").mkdir(parents=True)
    with pytest.raises(InputError, match=r"states_from=.*other.*no network that was fitted"):
        MetaTrainingConfig(str(tmp_path / "output"), states_from=[str(empty)], ensemble=[member])


def test_an_earlier_network_drives_the_first_round(tmp_path: Path) -> None:
    earlier = network_saying(1.0)
    earlier.save_pretrained(tmp_path / "earlier")
    with pytest.raises(InputError, match=r"earlier_networks=.*layers of \(4,\).*\(64,\)"):
        MetaTrainingConfig(str(tmp_path / "output"), hidden_sizes=[[64]], earlier_networks=[str(tmp_path / "earlier")],
                           ensemble=[{"hidden_sizes": [8], "seed": 0, "num_iterations": 1}])  # fmt: skip
    config = MetaTrainingConfig(str(tmp_path / "output"), num_groups=1, num_held_out_groups=1, num_tasks=1,
                                num_members=2, max_cost=1.0, num_workers=1, hidden_sizes=[[4]],
                                earlier_networks=[str(tmp_path / "earlier")],
                                ensemble=[{"hidden_sizes": [8], "seed": 0, "num_iterations": 1}])  # fmt: skip

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "round 0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        meta_train(config, stop)
    group = load_group(group_path(tmp_path / "output" / "bank", 1))
    states = States.load([tmp_path / "output" / "states" / "round0-000001.pt"])
    expected = visit(group, earlier, 2, 1)
    torch.testing.assert_close(states.log_rates, expected.log_rates)
    assert not torch.equal(expected.log_rates, visit(group, None, 2, 1).log_rates)


@pytest.mark.slow
def test_the_small_configuration_ends_after_an_interruption(tmp_path: Path) -> None:
    """As a person runs it: stopped in the second round, the same command goes on, and its network drives a run."""
    path = Path(meta_training.__file__).parent / "small.yaml"
    command = [sys.executable, "-m", "hf_alrs.cli", "meta-train", "--config", str(path)]
    start = time.monotonic()
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as first:
        for line in first.stdout:
            if "fit 0: 1 of 1" in line:
                first.send_signal(signal.SIGINT)
    assert first.returncode != 0
    output = tmp_path / "outputs" / "meta-training-small"
    assert not (output / "report.json").exists()
    states = {file: file.stat().st_mtime_ns for file in (output / "states").glob("round0-*.pt")}
    assert len(states) == 52
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "bank: 68 of 68" in again.stdout and "round 1: 52 of 52" in again.stdout
    assert states == {file: file.stat().st_mtime_ns for file in states}, "finished work is found again"
    print(f"{time.monotonic() - start:.0f} s\n{again.stdout}")

    report = json.loads((output / "report.json").read_text())
    for name in ("64-32", "64-64"):
        assert sorted(file.name for file in (output / name).iterdir()) == [
            "README.md",
            "config.json",
            "model.safetensors",
        ]
        assert report[name]["mean_regret"] < 0.5, "1 is what a uniform guess has"
        assert f"mean {report[name]['mean_regret']:.4f}" in (output / name / "README.md").read_text()
    network = load_network(str(output / "64-32"), (64, 32), 0)
    outcome = evaluate_group(load_group(group_path(output / "bank", 0)), network)
    assert np.isfinite(outcome["regret"]).all()


@pytest.mark.slow
def test_a_small_meta_training_ends_and_resumes(tmp_path: Path) -> None:
    config = MetaTrainingConfig(
        output_dir=str(tmp_path),
        num_groups=6,
        num_held_out_groups=2,
        num_tasks=2,
        num_members=3,
        num_rounds=2,
        num_iterations=200,
        max_cost=1.0,
    )
    report = meta_train(config)
    assert math.isfinite(report["64-32"]["mean_regret"])
    with_ensemble = replace(
        config,
        ensemble=[{"hidden_sizes": [16], "seed": 1, "num_iterations": 50, "feature_noise": {"epochs": 0.5}}],
        num_distillation_iterations=50,
        num_long_groups=1,
        num_held_out_long_groups=1,
        max_long_cost=4.0,
        num_short_groups=1,
        num_held_out_short_groups=1,
    )
    table = meta_train(replace(with_ensemble, output_dir=str(tmp_path / "second"), states_from=[str(tmp_path)]))
    assert math.isfinite(table["64-32-long"]["mean_regret"]) and math.isfinite(table["64-32-short"]["mean_regret"])
    assert sorted(path.name for path in (tmp_path / "second").glob("*ed-*")) == ["distilled-64-32", "distilled-64-64"]
    stages: list[str] = []
    states = sorted((tmp_path / "states").iterdir())
    states[0].unlink()
    before = [path.stat().st_mtime_ns for path in states[1:]]
    again = meta_train(config, lambda stage, done, total: stages.append(stage))
    assert [path.stat().st_mtime_ns for path in states[1:]] == before, "finished work is found again"
    assert again["64-32"] == report["64-32"]
    assert json.loads((tmp_path / "report.json").read_text())["64-64"]["num_tasks"] >= 1
