"""What `--rl-share-prefix` does in Megatron-LM's `train_rl.py`: patches/megatron-lm/ calls these from `megatron/rl`.

Upstream's sequence packing (`--rl-use-sequence-packing`) puts whole sequences side by side into bins and computes its
loss on tensors [bins, bin_size - 1] of per-token values. Here a bin is a `Pack`: rows of prefix groups instead of whole
sequences, as many more of them as their prefixes are shared. Everything that upstream does with a bin stays upstream's:
how bins go to data-parallel ranks, clipping, KL, truncated importance sampling, entropy, metrics and scaling.
"""

from megatron_prefix.megatron_rl.arguments import configure, exchange_rows_of_packs
from megatron_prefix.megatron_rl.bins import bin_log_probs
from megatron_prefix.megatron_rl.hooks import pack_prefix_groups

__all__ = ["bin_log_probs", "configure", "exchange_rows_of_packs", "pack_prefix_groups"]
