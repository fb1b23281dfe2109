"""transformers classes around the model; importing this package registers them for `model_type: huginn_raven`.

A folder written by `model.save_pretrained` carries the code of the model and loads without this package.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from recurrent_depth.hf.configuration import RecurrentDepthConfig
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM
from recurrent_depth.hf.remote_code import write_code

AutoConfig.register(RecurrentDepthConfig.model_type, RecurrentDepthConfig, exist_ok=True)
AutoModelForCausalLM.register(RecurrentDepthConfig, RecurrentDepthForCausalLM, exist_ok=True)
RecurrentDepthForCausalLM.write_code = write_code

__all__ = ["RecurrentDepthConfig", "RecurrentDepthForCausalLM"]
