"""Everything that imports megatron-core: groups, model, checkpoints, attention in the layer, training step."""
