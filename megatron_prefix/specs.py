"""Ready-made specs for Megatron-LM's ``--spec megatron_prefix.specs NAME``.

Megatron-LM takes NAME from the module's attributes as it stands and hands it to `GPTModel`, so these are plain
`ModuleSpec` objects, built when the module is imported. The attention implementation is "auto": chosen by the device
and refused by name, at the first forward pass, where it cannot run. For anything else use
`megatron_prefix.prefix_gpt_layer_spec`, or `megatron_prefix.with_prefix_attention` on a spec of your own.

    NAME                      linear and norm modules            qk layernorm
    local                     megatron-core, LayerNorm           no
    local_rmsnorm             megatron-core, RMSNorm             no
    local_rmsnorm_qk          megatron-core, RMSNorm             yes
    local_qk                  megatron-core, LayerNorm           yes
    te                        Transformer Engine                 no
    te_qk                     Transformer Engine                 yes

The ``te`` names exist where megatron-core can import Transformer Engine; its norm follows ``--normalization``.
"""

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)

from megatron_prefix.mcore.layer_specs import with_prefix_attention

local = with_prefix_attention(get_gpt_layer_local_spec())
local_qk = with_prefix_attention(get_gpt_layer_local_spec(qk_layernorm=True))
local_rmsnorm = with_prefix_attention(get_gpt_layer_local_spec(normalization="RMSNorm"))
local_rmsnorm_qk = with_prefix_attention(get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True))

if HAVE_TE:
    te = with_prefix_attention(get_gpt_layer_with_transformer_engine_spec())
    te_qk = with_prefix_attention(get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True))
