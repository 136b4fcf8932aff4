"""The switch: verl's Megatron actor configuration whose ``use_prefix_grouper`` reaches the engine."""

from __future__ import annotations

from dataclasses import dataclass

from verl.workers.config import McoreActorConfig

BACKEND = "megatron_prefix"
"""The name that `PrefixMegatronEngine` has in verl's `EngineRegistry`."""


@dataclass
class PrefixActorConfig(McoreActorConfig):
    """`McoreActorConfig` for ``actor_rollout_ref.actor._target_``, and for ``actor_rollout_ref.ref._target_``.

    With ``use_prefix_grouper`` the worker's engine is `PrefixMegatronEngine`; without, it is verl's own, as if this
    class were not there. Every other setting is verl's.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_prefix_grouper:
            # The engine's configuration is frozen; verl names the engine of its FSDP actors in this way, too.
            object.__setattr__(self.engine, "strategy", BACKEND)
