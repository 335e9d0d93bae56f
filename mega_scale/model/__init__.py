"""The Hugging Face Mega family on one device."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mega_scale.model.cache import MegaCache
from mega_scale.model.configuration_mega import MegaConfig
from mega_scale.model.modeling_mega import MegaForCausalLM, MegaModel, MegaPreTrainedModel

AutoConfig.register(MegaConfig.model_type, MegaConfig, exist_ok=True)
AutoModel.register(MegaConfig, MegaModel, exist_ok=True)
AutoModelForCausalLM.register(MegaConfig, MegaForCausalLM, exist_ok=True)

__all__ = ["MegaCache", "MegaConfig", "MegaForCausalLM", "MegaModel", "MegaPreTrainedModel"]
