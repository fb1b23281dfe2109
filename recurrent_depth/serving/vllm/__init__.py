"""A plugin for vLLM: recurrent-depth models with a depth per request. vLLM finds it by its entry point and calls
`register`; only then is vLLM imported.

    vllm serve EXPORT --hf-overrides '{"num_steps": 32, "default_num_steps": 16}'

`options.py` has the fields for --hf-overrides, `rules.py` what vLLM must not do with them, `model.py` the model class,
`core.py` its iterations, `rows.py` and `slots.py` the depth of each request in vLLM's two model runners.
"""


def register() -> None:
    """Register the model class and the rules for its configuration with vLLM."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import recurrent_depth.hf  # noqa: F401 (registers the configuration class)
    from recurrent_depth.serving.vllm.rules import Rules

    name = "RavenForCausalLM"  # the architecture in config.json, of released folders too
    ModelRegistry.register_model(name, f"recurrent_depth.serving.vllm.model:{name}")
    MODELS_CONFIG_MAP[name] = Rules
