"""Which parameters decay, and that each is updated once."""

import pytest
import torch
from torch import nn

from mega_scale.model import MegaConfig, MegaForCausalLM, MegalodonConfig, MegalodonForCausalLM
from mega_scale.training.config import OptimizerConfig, build_optimizer

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


def test_all_decays_everything_in_one_group():
    for model in (_model(), MegalodonForCausalLM(MegalodonConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1,
                  timestep_norm_groups=2, ema_projection_size=2, intermediate_size=8, shared_representation_size=4,
                  nffn_hidden_size=8, rescale_nffn=True))):  # fmt: skip
        [group] = build_optimizer(model, OptimizerConfig(weight_decay=0.25, decay="all")).param_groups
        assert group["weight_decay"] == 0.25
        assert {*group["params"]} == {*model.parameters()} and len(group["params"]) == len({*group["params"]})


def test_only_matrices_of_a_megalodon_decay():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "nffn_hidden_size": 8, "shared_representation_size": 4}
    options = {"vocab_size": 11, "timestep_norm_groups": 2, "num_hidden_layers": 1, "swiglu": True}
    decay, places = _groups(MegalodonForCausalLM(MegalodonConfig(**sizes, **options)))
    assert places == len(decay)
    matrices = {"embed", "wv", "wz", "wr", "wh1", "wh2", "fc1", "fc2", "fc3", "lm_head"}
    for name, value in decay.items():
        *_, module, parameter = name.split(".")
        assert (value == 0.25) == (module in matrices and parameter == "weight"), name


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
