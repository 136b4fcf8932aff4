"""For ``megatron rlhf --rlhf_type grpo --external_plugins examples/ms_swift/plugin.py``: shared prompts encoded once.

ms-swift imports its plugins before it looks its trainer up by name in ``swift.megatron.trainers``.
"""

import swift.megatron.trainers as trainers

from megatron_prefix.ms_swift.trainer import PrefixGRPOTrainer

trainers.MegatronGRPOTrainer = PrefixGRPOTrainer
