"""Which parameters decay, and that each is updated once."""

import itertools
import math

import pytest
import torch
from torch import nn

from mega_scale.config import RunConfig
from mega_scale.model import MegaConfig, MegaForCausalLM
from mega_scale.training.config import OptimizerConfig, ScheduleConfig, TrainConfig, build_optimizer
from mega_scale.training.trainer import learning_rate

# The matrices of a Mega language model, by the end of their names: all that decays.
MATRICES = (
    "word_embeddings.weight",
    "v_proj.weight",
    "mx_proj.weight",
    "h_proj.weight",
    "fc1.weight",
    "fc2.weight",
    "dense.weight",
    "lm_head.weight",
)


def _model(**settings) -> MegaForCausalLM:
    config = MegaConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        intermediate_size=12,
        ema_projection_size=2,
        shared_representation_size=4,
        nffn_hidden_size=12,
        max_positions=8,
        is_decoder=True,
        bidirectional=False,
        **settings,
    )
    return MegaForCausalLM(config)


def _groups(model: nn.Module) -> tuple[dict[str, float], int]:
    """Give every parameter's decay by name, and how many places the groups hold in all."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, OptimizerConfig(weight_decay=0.25)).param_groups
    decay = {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}
    return decay, sum(len(group["params"]) for group in groups)


@pytest.mark.parametrize("bias", ["rotary", "simple"])
@pytest.mark.parametrize("norm", ["scalenorm", "layernorm", "rmsnorm"])
@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay_and_each_parameter_is_in_one_group(bias, norm, tied):
    model = _model(relative_positional_bias=bias, normalization_type=norm, tie_word_embeddings=tied)
    decay, places = _groups(model)
    assert decay == {name: 0.25 if name.endswith(MATRICES) else 0.0 for name, _ in model.named_parameters()}
    assert places == len(decay)
    assert ("lm_head.weight" in decay) is not tied
    kept = {name.rpartition(".")[2] for name, value in decay.items() if value == 0}
    ema = {"damping_factor", "decay_factor", "ema_expansion_matrix", "kernel_projection_matrix", "residual_weight"}
    assert kept >= ema | {"qk_weight", "qk_bias", "bias"}


def test_frozen_parameters_are_left_out():
    model = _model()
    model.mega.embedding_layer.requires_grad_(False)
    decay, _ = _groups(model)
    assert not any("embedding" in name for name in decay)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(model.requires_grad_(False), OptimizerConfig())


def test_settings_reach_adamw_and_a_step_is_its_formula():
    layer = nn.Linear(3, 2)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    config = OptimizerConfig(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.5)
    optimizer = build_optimizer(layer, config)
    layer(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    for name, parameter in layer.named_parameters():
        # The first step of Adam moves by lr * g / (|g| + eps); decay is decoupled and spares the bias.
        kept = before[name] * (1 - 0.01 * 0.5) if name == "weight" else before[name]
        expected = kept - 0.01 * parameter.grad / (parameter.grad.abs() + 1e-6)
        torch.testing.assert_close(parameter.detach(), expected)
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_a_model_without_matrices_has_one_group():
    groups = build_optimizer(nn.LayerNorm(4), OptimizerConfig()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0]


# The schedule

BASE, TOTAL = 1e-3, 110


def _run(schedule: ScheduleConfig, lr: float, steps: int) -> RunConfig:
    return RunConfig(optimizer=OptimizerConfig(lr=lr), schedule=schedule, train=TrainConfig(steps=steps))


def _rate(step: int, **settings) -> float:
    return learning_rate(step, _run(ScheduleConfig(**settings), BASE, TOTAL))


def test_rise_is_linear_and_ends_at_the_base_rate():
    rates = [_rate(step, warmup_steps=10, warmup_init_lr=1e-4) for step in range(10)]
    assert rates[0] == pytest.approx(1e-4 + 9e-4 / 10)  # the first update is not spent at the initial rate
    steps = [after - before for before, after in itertools.pairwise(rates)]
    assert steps == pytest.approx([9e-5] * 9)
    assert rates[-1] == pytest.approx(BASE)


def test_a_rise_below_one_is_a_share_of_the_run():
    assert [_rate(step, warmup_steps=0.1) for step in range(TOTAL)] == [
        _rate(step, warmup_steps=11) for step in range(TOTAL)
    ]

    def risen(warmup_steps, steps):
        schedule = ScheduleConfig("constant", warmup_steps)
        return next(step for step in range(steps) if learning_rate(step, _run(schedule, 1.0, steps)) == 1.0)

    assert [risen(0.3, steps) for steps in (1, 6, 200)] == [0, 0, 59]
    assert [risen(whole, 1000) for whole in (0, 1, 60, 60.0)] == [0, 0, 59, 59]


def test_no_rise_starts_at_the_base_rate():
    assert _rate(0) == BASE


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_fall_reaches_the_least_rate_at_the_end_and_stays_there(decay):
    settings = {"decay": decay, "warmup_steps": 10, "min_lr": 1e-5}
    assert _rate(10, **settings) == pytest.approx(BASE)
    assert _rate(60, **settings) == pytest.approx((BASE + 1e-5) / 2)  # halfway in either shape
    assert 1e-5 < _rate(TOTAL - 1, **settings) < 3e-5
    assert _rate(TOTAL, **settings) == _rate(10 * TOTAL, **settings) == pytest.approx(1e-5)
    rates = [_rate(step, **settings) for step in range(10, TOTAL)]
    assert rates == sorted(rates, reverse=True)


def test_shapes_follow_their_formulas():
    done = 25 / 100
    assert _rate(35, decay="linear", warmup_steps=10) == pytest.approx(BASE * (1 - done))
    assert _rate(35, decay="cosine", warmup_steps=10) == pytest.approx(BASE * (1 + math.cos(math.pi * done)) / 2)


def test_constant_stays_at_the_base_rate():
    assert {_rate(step, decay="constant", warmup_steps=10, min_lr=1e-5) for step in range(10, 2 * TOTAL)} == {BASE}


def test_a_rise_as_long_as_the_run_never_falls():
    assert _rate(TOTAL - 1, warmup_steps=TOTAL) == pytest.approx(BASE)
