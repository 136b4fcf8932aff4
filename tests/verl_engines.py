"""verl's real engines on the CPU, for tests: plain and with prefix groups, on one tiny model and the same batches.

Runs in a rank of `run_distributed` after `start`; verl is imported inside the functions, because it is not installed
but lies unpacked in a folder.
"""

import copy
import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.mcore.cpu import run_on_cpu
from megatron_prefix.mcore.parallel import seed_everything

VOCABULARY = 258  # of `write_byte_tokenizer`
WIDTH = 12  # of prompts and of responses, padding included
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
ON_CPU: dict[str, Any] = {  # of megatron-core's TransformerConfig
    "use_cpu_initialization": True,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
}


SUMS = ("actor/pg_loss", "actor/entropy_loss", "kl_loss")
"""Metrics that verl adds up over micro-batches; the others are means of what a micro-batch happens to hold."""

REFUSED_BY_WORKER: dict[str, Any] = {
    "model.model_type": "value_model",
    "model.mtp.enable": True,
    "model.hf_config.vision_config": {},
    "megatron.use_remove_padding": False,
    "megatron.use_fused_kernels": True,
    "megatron.dynamic_context_parallel": True,
    "megatron.pad_to_length": True,
    "megatron.use_megatron_fsdp": True,
    "megatron.router_replay.mode": "R2",
    "megatron.qat.enable": True,
}
REFUSED_BY_BATCH: dict[str, Any] = {
    "calculate_sum_pi_squared": True,
    "distillation_use_topk": True,
    "distillation_only": True,
    "enable_routing_replay": True,
    "multi_modal_inputs": [{}],
    "pad_mode": "left_right",
}


def start(sources: Sequence[str]) -> None:
    """Make verl and what it needs importable, from ``sources``, on a machine without a GPU."""
    warnings.filterwarnings("ignore")
    sys.path[:0] = sources
    run_on_cpu()
    for device in (torch.cuda, torch.cpu):  # verl asks for free memory, of CUDA or (0.8) of the CPU
        device.mem_get_info = lambda *_: (0, 0)  # type: ignore[attr-defined]
    _register_bridge()


class PackedAttention(torch.nn.Module):
    """Plain causal attention of each sequence of a thd pack: megatron-core's own on the CPU takes no packs."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, packed_seq_params: Any, **__: Any) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq * D]."""
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        cu = packed_seq_params.cu_seqlens_q_padded
        outputs = []
        for first, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q[first:end], k[first:end]) * self.scale
            length = end - first
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
            outputs.append(
                torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[first:end])
            )
        return torch.cat(outputs).flatten(1)


def _register_bridge() -> None:
    """Give mbridge layers without Transformer Engine, and random weights instead of a checkpoint's, by its registry."""
    from mbridge.core import register_model
    from mbridge.models.qwen2 import Qwen2Bridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import ModelType

    if not hasattr(ModelType, "encoder_and_decoder"):  # mbridge asks for it, megatron-core 0.19 has it no more
        ModelType.encoder_and_decoder = None  # type: ignore[attr-defined]

    @register_model("qwen2")
    class CpuBridge(Qwen2Bridge):
        has_vp_stage = True

        def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
            spec = get_gpt_layer_local_spec(normalization="RMSNorm")
            spec.submodules.self_attention.submodules.core_attention = PackedAttention
            return spec

        def load_weights(self, *_: Any, **__: Any) -> None:
            """Weights stay as they were drawn."""


def build(folder: Path, *, prefix: bool, sizes: dict[str, int] | None = None, **overrides: Any) -> Any:
    """verl's engine of a worker, as `TrainingWorker` makes it, initialized.

    sizes: of `McoreEngineConfig`. overrides: of megatron-core's TransformerConfig.
    """
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig, McoreActorConfig, McoreEngineConfig, McoreOptimizerConfig

    from megatron_prefix.verl import PrefixActorConfig

    engine_config = McoreEngineConfig(
        **(sizes or {}),
        vanilla_mbridge=True,
        use_distributed_optimizer=False,
        override_transformer_config=ON_CPU | overrides,
    )
    object.__setattr__(engine_config, "dtype", "float32")  # verl's own check lets bf16 and fp16 pass
    switch: Any = partial(PrefixActorConfig, use_prefix_grouper=True) if prefix else McoreActorConfig
    config = switch(megatron=engine_config, rollout_n=3, use_dynamic_bsz=True).engine
    engine = engine_class(config)(
        HFModelConfig(path=str(folder), override_config={"attn_implementation": "eager"}),
        config,
        McoreOptimizerConfig(lr=1e-3, lr_warmup_steps=0, total_training_steps=10),
        CheckpointConfig(),
    )
    seed_everything(1)  # verl seeds megatron-core's generators where there is a GPU
    engine.initialize()
    return engine


def engine_class(engine_config: Any) -> Any:
    """What verl's registry has for a configuration on a GPU: 0.8 names the CPU otherwise, and has no engine there."""
    from verl.workers.engine import EngineRegistry

    return EngineRegistry._engines["language_model"][engine_config.strategy]["cuda"]


def rollouts(prompts: int = 4, seed: int = 0, order_seed: int | None = None, **settings: Any) -> Any:
    """A batch as a worker gets it from verl's trainer: three responses of each prompt, ragged, without padding.

    Some response tokens are masked out (outputs of a tool); the policies before are random. Sequences stand in the
    order of their prompts, or shuffled by ``order_seed``.
    """
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    draw = torch.Generator().manual_seed(seed)
    width, samples = WIDTH, 3
    count = prompts * samples
    lengths = torch.randint(2, width + 1, (prompts,), generator=draw).repeat_interleave(samples)
    response_lengths = torch.randint(1, width + 1, (count,), generator=draw)
    columns = torch.arange(width)
    prompt_mask, response_mask = columns >= width - lengths[:, None], columns < response_lengths[:, None]
    ids = torch.randint(VOCABULARY, (prompts, width), generator=draw).repeat_interleave(samples, 0) * prompt_mask
    responses = torch.randint(VOCABULARY, (count, width), generator=draw) * response_mask
    trained = response_mask & (torch.rand(count, width, generator=draw) < 0.8)
    trained[:, 0] = True
    mask = torch.cat([prompt_mask, response_mask], 1)
    sequences = [row[kept] for row, kept in zip(torch.cat([ids, responses], 1), mask, strict=True)]
    positions = [torch.arange(len(row)) for row in sequences]
    batch = TensorDict(
        {
            "prompts": ids,
            "responses": responses,
            "attention_mask": mask.long(),
            "input_ids": torch.nested.as_nested_tensor(sequences, layout=torch.jagged),
            "position_ids": torch.nested.as_nested_tensor(positions, layout=torch.jagged),
            "response_mask": trained.long(),
            "loss_mask": trained.long(),
            "advantages": torch.randn(count, 1, generator=draw).expand(-1, width) * trained,
            **{name: torch.randn(count, width, generator=draw) - 6 for name in ("old_log_probs", "ref_log_prob")},
        },
        batch_size=count,
    )
    if order_seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(order_seed))
        batch = tu.index_select_tensor_dict(batch, order)
    tu.assign_non_tensor(batch, max_seq_len=2 * width, max_response_len=width, temperature=0.7, global_batch_size=count)
    tu.assign_non_tensor(batch, calculate_entropy=True, **settings)
    return batch


def without_padding(batch: Any) -> Any:
    """The same batch as trainers without any padding hand it over: every column a nested tensor."""
    lengths = batch["attention_mask"][:, WIDTH:].sum(1).tolist()
    result = batch.copy()
    for name in ("responses", "response_mask", "loss_mask", "advantages", "old_log_probs", "ref_log_prob"):
        rows = [row[:length] for row, length in zip(batch[name], lengths, strict=True)]
        result[name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    kept = batch["attention_mask"][:, :WIDTH].bool()
    rows = [row[mask] for row, mask in zip(batch["prompts"], kept, strict=True)]
    result["prompts"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return result.exclude("attention_mask", "max_response_len")


def loss_of(**settings: Any) -> Any:
    """verl's own loss of an actor, with entropy and KL terms."""
    from verl.workers.config import McoreActorConfig, McoreEngineConfig
    from verl.workers.utils.losses import ppo_loss

    config = McoreActorConfig(
        megatron=McoreEngineConfig(), rollout_n=3, use_dynamic_bsz=True, entropy_coeff=0.1, use_kl_loss=True,
        kl_loss_coef=0.2, **settings,
    )  # fmt: skip
    return partial(ppo_loss, config=config)


def scores(engine: Any, batch: Any) -> dict[str, Tensor]:
    """Old log-probs and entropy as the trainer gets them, [B, width]; empty on stages before the last."""
    from verl.workers.utils.padding import no_padding_2_padding

    with engine.eval_mode():
        outputs = engine.infer_batch(batch.copy(), loss_function=None)
    rows = {name: no_padding_2_padding(x, batch) for name, x in outputs.get("model_output", {}).items()}
    return {name: torch.nn.functional.pad(x, (0, WIDTH - x.shape[1])) for name, x in rows.items()}


def update(engine: Any, batch: Any, loss: Any) -> dict[str, Any]:
    """One training step: loss (last stage), metrics of the loss, gradients and updated parameters by name."""
    with engine.train_mode():
        engine.optimizer_zero_grad()
        outputs = engine.forward_backward_batch(batch.copy(), loss)
        named = [(f"{i}.{name}", p) for i, chunk in enumerate(engine.module) for name, p in chunk.named_parameters()]
        gradients = {name: p.main_grad.clone() for name, p in named}
        norm = engine.optimizer_step()
    return {
        "loss": sum(outputs.get("loss", [])),
        "metrics": {name: _total(values) for name, values in outputs.get("metrics", {}).items() if name in SUMS},
        "micro_batches": len(outputs.get("loss", [])),
        "gradients": gradients,
        "grad_norm": float(norm),
    }


def _total(values: Any) -> float:
    """Of one metric over micro-batches, as the worker adds it up."""
    return float(values.aggregate() if hasattr(values, "aggregate") else sum(float(each) for each in values))


def own_spec_is_back(engine: Any) -> bool:
    """Whether the bridge builds plain layers again, after a model with prefix groups was built by it."""
    return (
        engine.bridge._get_transformer_layer_spec().submodules.self_attention.submodules.core_attention
        is PackedAttention
    )


def takes_prefix_attention() -> dict[str, bool]:
    """Whether each form in which a bridge may have its layers becomes prefix-grouped, and keeps its signature."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_prefix.mcore.self_attention import PrefixSelfAttention
    from megatron_prefix.verl.engine import _with_prefix_attention

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")

    def of_config(config: Any) -> Any:
        return spec

    def of_stage(config: Any, vp_stage: int | None = None) -> Any:
        return spec

    made = {
        "spec": _with_prefix_attention(spec),
        "function": _with_prefix_attention(of_config)(None),
        "function of a stage": _with_prefix_attention(of_stage)(None, vp_stage=1),
    }
    found = {name: each.submodules.self_attention.module is PrefixSelfAttention for name, each in made.items()}
    for name, function in (("signature", of_config), ("signature with a stage", of_stage)):
        found[name] = inspect.signature(_with_prefix_attention(function)) == inspect.signature(function)
    return found


def example_settings(folder: str) -> list[str]:
    """The settings that examples/verl/grpo_megatron.sh gives to verl."""
    script = Path(__file__).parents[1] / "examples" / "verl" / "grpo_megatron.sh"
    said = subprocess.run(
        ["bash", "-c", 'python3() { printf "%s\\0" "$@"; }; source "$0"', str(script)],
        env={"PATH": os.environ["PATH"], "MODEL": folder, "TRAIN_FILES": "train.parquet", "VAL_FILES": "val.parquet"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    assert said[:4] == ["-m", "verl.trainer.main_ppo", "--config-name", "ppo_megatron_trainer"]
    return said[4:-1]


def example_engines(source: str, folder: str) -> dict[tuple[str, bool], str]:
    """The engines of (role, use_prefix_grouper) by verl's own configuration files and the settings of the example."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    found = {}
    with initialize_config_dir(str(Path(source, "verl", "trainer", "config").resolve()), version_base=None):
        for on in (True, False):
            switch = f"actor_rollout_ref.actor.use_prefix_grouper={on}"
            config = compose("ppo_megatron_trainer", [*example_settings(folder), switch])
            for role in ("actor", "ref"):
                settings = OmegaConf.to_container(config.actor_rollout_ref[role], resolve=True)
                # What the worker does with a reference's settings before it makes them an object.
                settings = {name: x for name, x in settings.items() if not name.startswith("log_prob_")}
                made = omega_conf_to_dataclass(OmegaConf.create(settings | {"use_dynamic_bsz": True}))
                found[role, on] = engine_class(made.engine).__name__
    return found


def refusals(engine: Any, batch: Any) -> dict[str, str | None]:
    """What `PrefixMegatronEngine` says to each setting that it cannot do; None where it says nothing."""
    from verl.utils import tensordict_utils as tu

    from megatron_prefix.verl import PrefixMegatronEngine
    from megatron_prefix.verl.support import refuse_model_settings

    def message(call: Any) -> str | None:
        try:
            call()
        except ValueError as error:
            return str(error)
        return None

    found: dict[str, str | None] = {}
    for path, value in REFUSED_BY_WORKER.items():
        root, *names, last = path.split(".")
        model_config, engine_config = copy.deepcopy(engine.model_config), copy.deepcopy(engine.engine_config)
        owner = model_config if root == "model" else engine_config
        for name in names:
            owner = getattr(owner, name)
        object.__setattr__(owner, last, value)
        found[path] = message(partial(PrefixMegatronEngine, model_config, engine_config, None, None))
    for name, value in {"fp8": "hybrid", "variable_seq_lengths": False, "moe_aux_loss_coeff": 0.1}.items():
        config = copy.copy(engine.tf_config)
        config.pipeline_model_parallel_size, config.variable_seq_lengths = 2, True
        setattr(config, name, value)
        found[name] = message(partial(refuse_model_settings, config))
    for name, given in REFUSED_BY_BATCH.items():
        asked = batch.copy()
        tu.assign_non_tensor_data(asked, name, given)
        found[name] = message(partial(engine.forward_backward_batch, asked, None, forward_only=True))
    mixed = batch.copy()
    mixed["temperature"] = torch.linspace(0.5, 1.0, len(batch))
    found["temperature"] = message(partial(engine.forward_backward_batch, mixed, None, forward_only=True))
    for name in ("prompts", "responses"):
        short = batch.exclude(name)
        found[name] = message(partial(engine.forward_backward_batch, short, None, forward_only=True))
    tight = batch.copy()
    tu.assign_non_tensor(tight, max_token_len_per_gpu=5)
    found["max_tokens_per_pack"] = message(partial(engine.forward_backward_batch, tight, None, forward_only=True))
    return found
