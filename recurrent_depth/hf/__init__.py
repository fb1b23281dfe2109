"""transformers classes around the model; importing this package registers them for `model_type: huginn_raven`."""

from transformers import AutoConfig, AutoModelForCausalLM

from recurrent_depth.hf.configuration import RecurrentDepthConfig
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM

AutoConfig.register(RecurrentDepthConfig.model_type, RecurrentDepthConfig, exist_ok=True)
AutoModelForCausalLM.register(RecurrentDepthConfig, RecurrentDepthForCausalLM, exist_ok=True)

__all__ = ["RecurrentDepthConfig", "RecurrentDepthForCausalLM"]
