"""Names that megatron-core imports for experts, which are never built."""

fused_topk_with_score_function = None
fused_compute_score_for_moe_aux_loss = None
fused_moe_aux_loss = None
