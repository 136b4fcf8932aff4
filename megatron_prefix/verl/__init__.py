"""verl's Megatron actor and reference worker on prefix groups. No patch: verl's own registry and configuration name it.

    actor_rollout_ref.actor._target_=megatron_prefix.verl.PrefixActorConfig
    actor_rollout_ref.actor.use_prefix_grouper=True

and the same two lines under ``ref`` where a reference model is used; `examples/verl/` has a script to copy.
"""

from megatron_prefix.verl.config import PrefixActorConfig
from megatron_prefix.verl.engine import PrefixMegatronEngine

__all__ = ["PrefixActorConfig", "PrefixMegatronEngine"]
