"""Self attention whose rows carry their own positions."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from megatron_prefix.mcore.core_attention import require_layout


class PrefixSelfAttention(SelfAttention):
    """megatron-core's `SelfAttention` with one rotary frequency per row.

    In a pack every response continues the positions of its prefix, while megatron-core restarts them at each segment.
    The rows' frequencies are picked from the model's table here, inside the layer, because that is the place that
    `GPTModel` and `HybridModel` share; rope, Llama-3 scaling and yarn (with its mscale) then work as they are.

    With ``apply_rope_fusion`` they go to Transformer Engine's kernel for plain sequences, which turns row i by
    frequency i: one launch for all queries and one for all keys, exact on every version and under context parallelism.
    Its ``start_positions`` for packed sequences would do on one rank from 2.10 on, but backward forgets them before,
    and ranks that own pieces of segments have no single start to give.

    Raises:
        ValueError: at construction, a configuration that asks for norms of queries and keys which the spec has not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("qk_layernorm", "qk_l2_norm"):
            if getattr(self.config, name) and isinstance(self.q_layernorm, IdentityOp):
                raise ValueError(
                    f"{name}=True, but the layer spec has no norm of queries and keys: make the spec with {name} "
                    f"(in megatron_prefix.specs those that end in _qk have qk_layernorm), or set {name}=False"
                )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the parent's; hidden_states [T, 1, hidden] (T / tp under sequence parallelism).

        While sampling with megatron-core's inference engine (dynamic batching), which attends by kernels of its own
        over its cache, it is the parent.

        Raises:
            ValueError: no layout came with the micro-batch, or inference with static batching.
        """
        if kwargs.get("inference_context") is not None:
            return super().forward(
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        packed = require_layout(packed_seq_params)
        if rotary_pos_emb is not None:
            tables = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
            rotary_pos_emb = (packed.rotary_rows(tables[0]), packed.rotary_rows(tables[1]))
        return super().forward(
            hidden_states,
            attention_mask,
            *args,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed.as_sbhd(),
            **kwargs,
        )
