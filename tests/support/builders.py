"""Small models with weights large enough to matter, and token ids for them."""

import torch

import mega_scale


def make_config(**changes):
    settings = {
        "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 20, "nffn_hidden_size": 28,
        "ema_projection_size": 3, "shared_representation_size": 8, "max_positions": 64, "bidirectional": False,
        "is_decoder": True, "use_chunking": True, "chunk_size": 8,
    }  # fmt: skip
    return mega_scale.MegaConfig(**{**settings, **changes})


def make_megalodon_config(**changes):
    settings = {
        "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
        "nffn_hidden_size": 28, "ema_projection_size": 3, "shared_representation_size": 8, "chunk_size": 8,
        "timestep_norm_groups": 4, "swiglu": True, "rescale_nffn": True,
    }  # fmt: skip
    return mega_scale.MegalodonConfig(**{**settings, **changes})


def make_model(seed=0, spread=0.2, kind="MegaForCausalLM", **changes):
    """A model in eval mode, a decoder unless told otherwise."""
    torch.manual_seed(seed)
    config = (make_megalodon_config if kind.startswith("Megalodon") else make_config)(**changes)
    model = getattr(mega_scale, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def make_ids(batch, length, vocabulary=61, seed=0):
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
