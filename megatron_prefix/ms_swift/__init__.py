"""ms-swift's Megatron GRPO with every shared prompt encoded once: a trainer and a model loader of its own kinds.

Only this package imports ms-swift and mcore-bridge. `trainer.PrefixGRPOTrainer` is what `megatron rlhf` runs when
`examples/ms_swift/plugin.py` is among its ``--external_plugins``; without the plugin nothing changes.
"""
