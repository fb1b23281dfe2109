"""The options of a served model, fields for vLLM's --hf-overrides. Imports neither torch nor vLLM."""

from dataclasses import dataclass, fields
from typing import Any

from recurrent_depth.checks import check_at_least, check_between, check_num_steps

REQUEST_FIELD = "num_steps"
"""Name of the number of iterations in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`)."""


@dataclass(frozen=True, kw_only=True)
class DepthOptions:
    """Depth, exit and cache of a served model.

    Args:
        num_steps: largest number of core iterations per token, of any request; the cache has entries for so many.
        default_num_steps: iterations of a request that asks for no number; null takes num_steps.
        cache_budget: iterations whose keys and values are kept; null keeps all.
        exit: `state-change` stops iterating a converged token; null always runs the iterations of the request.
        exit_threshold: threshold of the exit; null takes the published value.
        exit_prompt: let tokens of the prompt stop early too, in their order; false runs the prompt at full depth.
        salted: every request has a `cache_salt` with its num_steps, so that prefixes can be cached.
    """

    num_steps: int
    default_num_steps: int | None = None
    cache_budget: int | None = None
    exit: str | None = None
    exit_threshold: float | None = None
    exit_prompt: bool = False
    salted: bool = False

    def __post_init__(self) -> None:
        check_num_steps("num_steps", self.num_steps)
        check_between("default_num_steps", self.default_num_steps, 1, self.num_steps)
        check_at_least("cache_budget", self.cache_budget, 1)
        if self.exit not in (None, "state-change"):
            raise ValueError(
                f"exit is {self.exit!r}; in vLLM only state-change is implemented (the other rules need logits or a "
                "memory of earlier iterations): use it, or serve with --engine transformers"
            )
        if self.exit_threshold is not None and self.exit is None:
            raise ValueError('exit_threshold is given without exit; give "exit": "state-change" too')
        check_at_least("exit_threshold", self.exit_threshold, 0)
        if self.fixed_depth and (self.exit or self.default != self.num_steps):
            raise ValueError(
                f"cache_budget is {self.cache_budget} with num_steps {self.num_steps}, which in vLLM needs the same "
                "iterations for all tokens; set cache_budget to 1 or leave it out, or leave exit and default_num_steps "
                "out"
            )

    @classmethod
    def of(cls, hf_config: Any) -> "DepthOptions":
        """Return the options in a model's configuration, which holds --hf-overrides."""
        names = {field.name for field in fields(cls)} - {"num_steps"}
        given = {name: getattr(hf_config, name) for name in names if getattr(hf_config, name, None) is not None}
        if getattr(hf_config, "state_seed", None) is not None:
            raise ValueError("config.state_seed is set, but vLLM starts from a zero state; set it to null")
        return cls(num_steps=hf_config.num_steps or hf_config.mean_recurrence, **given)

    @property
    def default(self) -> int:
        """Iterations of a request that asks for no number."""
        return self.default_num_steps or self.num_steps

    @property
    def kept(self) -> int:
        """Iterations whose entries are kept."""
        return self.num_steps if self.cache_budget is None else min(self.cache_budget, self.num_steps)

    @property
    def shares_entries(self) -> bool:
        """Whether several iterations write to the same entries."""
        return self.kept < self.num_steps

    @property
    def fixed_depth(self) -> bool:
        """Whether all requests must take num_steps iterations.

        With 1 < cache_budget < num_steps a token that stopped earlier is read at other entries than its neighbours,
        which vLLM's attention cannot do.
        """
        return self.shares_entries and self.kept > 1

    @property
    def needs_one_pass(self) -> bool:
        """Whether the tokens of a prompt must be computed in one pass, once, for the result not to depend on it.

        Shared entries hold the last iteration of earlier passes, but the same iteration of the own pass; tokens of a
        prompt that stop in order wait for the earlier tokens of their pass.
        """
        return self.shares_entries or (self.exit is not None and self.exit_prompt)

    def check_request(self, num_steps: Any) -> None:
        """Raise a ValueError unless a request may ask for this number of iterations; None is the default."""
        if num_steps is None:
            return
        allowed = f"from {self.num_steps} to {self.num_steps}" if self.fixed_depth else f"from 1 to {self.num_steps}"
        low = self.num_steps if self.fixed_depth else 1
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not low <= num_steps <= self.num_steps:
            raise ValueError(f"num_steps is {num_steps!r}; on this server it must be an integer {allowed}")
