"""DeepSpeed as the engine of a megatron-core model: ZeRO over data- and context-parallel ranks, beside TP and CP."""
