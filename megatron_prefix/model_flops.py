"""Parameters and FLOPs of a model, by what they grow with. Plain Python on a `ModelConfig`.

FLOPs count matrix products, two per multiply-add, as in PaLM's MFU (arXiv 2204.02311, appendix B) and in Megatron-LM.
Backward costs twice the forward; attention's pairs are those of the mask, not of a square.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prefix.model_config import ModelConfig
from megatron_prefix.workload import Workload


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model's parts.

    Attributes:
        layer_parameters: of the matrices of one transformer layer.
        head_parameters: of the output layer, tied to the embedding or not.
        embedding_parameters: of the word embedding.
        norm_parameters: of all norms and biases.
        num_layers: transformer layers.
        attention_width: query heads x head dim of one layer.
    """

    layer_parameters: int
    head_parameters: int
    embedding_parameters: int
    norm_parameters: int
    num_layers: int
    attention_width: int
    tied: bool

    @classmethod
    def of(cls, config: ModelConfig) -> ModelSize:
        """Of a dense model."""
        hidden, width = config.hidden_size, config.num_attention_heads * config.channels
        kv_width = config.groups * config.channels
        attention = hidden * (width + 2 * kv_width) + width * hidden
        mlp = (3 if config.activation == "swiglu" else 2) * hidden * config.ffn_hidden_size
        vectors = 1 if config.norm == "rmsnorm" else 2
        norms = (2 * config.num_layers + 1) * hidden * vectors
        if config.qk_layernorm:
            norms += 2 * config.num_layers * config.channels * vectors
        if config.qkv_bias:
            norms += config.num_layers * (width + 2 * kv_width)
        learned = config.max_position_embeddings * hidden if config.position_embedding == "learned_absolute" else 0
        words = config.vocab_size * hidden
        return cls(attention + mlp, words, words + learned, norms, config.num_layers, width, config.tied_embeddings)

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        head = 0 if self.tied else self.head_parameters
        return self.num_layers * self.layer_parameters + self.embedding_parameters + head + self.norm_parameters

    def forward_flops(self, work: Workload) -> int:
        """Of a forward pass: rows through all layers, rows with a target through the output layer, pairs."""
        return (
            2 * self.num_layers * self.layer_parameters * work.rows
            + 2 * self.head_parameters * work.target_rows
            + 4 * self.num_layers * self.attention_width * work.pairs
        )

    def step_flops(self, work: Workload) -> int:
        """Of forward and backward, without what recompute does again."""
        return 3 * self.forward_flops(work)
