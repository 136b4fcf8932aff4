"""ms-swift's own trainer and models on the CPU, with prefix groups and without.

A program of its own (see tests/test_ms_swift.py), because ms-swift and mcore-bridge change megatron-core when they are
imported, and need Transformer Engine to import: its GPU kernels are the one thing that is stood in for, see
`tests/te_stand_in`. All else is theirs: the model's configuration, the loading of Hugging Face weights, the collator,
old and reference log-probs, every loss, megatron-core's schedules, DDP and the reduction of gradients.

The oracle is `MegatronGRPOTrainer`, unpatched, on repeated prompts. Its attention is dense and plain torch where
ms-swift packs, and megatron-core's own where it pads.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mcore_bridge.model.register import ModelLoader, get_model_meta, register_model
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from swift.megatron.arguments import MegatronRLHFArguments
from swift.megatron.pipelines.train.rlhf import MegatronRLHF
from swift.megatron.trainers.grpo_trainer import MegatronGRPOTrainer
from swift.megatron.utils import get_padding_to
from swift.rl_core.data import GRPOSample
from swift.rlhf_trainers.utils import collate_to_grpo_micro_batch
from swift.template import Template
from swift.utils.utils import import_external_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_prefix.mcore.parallel import ParallelSizes, initialize, seed_everything
from megatron_prefix.mcore.stages import whole_model_parameters
from megatron_prefix.ms_swift.model import PrefixLoader, prefix_loader, share_prefixes
from megatron_prefix.ms_swift.trainer import PrefixGRPOTrainer
from tests.distributed import fill_fresh_memory_with_nan
from tests.mcore_helpers import start

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
# Prompt, tokens of the policy, what a tool says, the policy's again. Groups of the first micro-batch are interleaved.
SEQUENCES: list[tuple[list[int], list[int], list[int], list[int]]] = [
    ([1, 2, 3, 4, 5], [6, 7], [], []),
    ([11, 12, 13], [14, 15, 16, 17], [], []),
    ([1, 2, 3, 4, 5], [9, 10, 11, 12, 13, 14], [], []),
    ([11, 12, 13], [18], [], []),
    ([21, 22, 23, 24], [25, 26], [27, 28, 29], [30]),
    ([21, 22, 23, 24], [31], [], []),
    ([21, 22, 23, 24], [25, 26, 32], [33], [34, 35]),
    ([40, 41], [42, 43, 44], [], []),
]
SIZE = 4  # sequences of a micro-batch
ADVANTAGES = (1.0, -0.5, 0.25, -1.0, 0.5, 1.5, -0.75, 0.1)
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


@dataclass(frozen=True)
class Case:
    """One way to run a step: parallel sizes, ms-swift's frame, its arguments."""

    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    padding_free: bool = True
    sequence_parallel: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


class DenseAttention(torch.nn.Module):
    """Causal attention within each packed sequence, in place of Transformer Engine's."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, packed_seq_params: Any, **__: Any) -> Tensor:
        """q [T, heads, D], k and v [T, groups, D] -> [T, heads * D]."""
        ends = packed_seq_params.cu_seqlens_q.tolist()
        sequence = torch.bucketize(torch.arange(ends[-1]), torch.tensor(ends[1:]), right=True)
        allowed = (sequence[:, None] == sequence[None, :]).tril()
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


class PackedLoader(ModelLoader):
    """mcore-bridge's own model, with the oracle's attention."""

    def get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        spec = super().get_transformer_layer_spec(vp_stage)
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = DenseAttention
        return spec


class LocalLoader(ModelLoader):
    """mcore-bridge's model of megatron-core's local layers: the stand-in for Transformer Engine's has no ranks."""

    def get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        layer = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
        layers = [layer] * self.config.num_layers
        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=WrappedTorchNorm)

    def build_model(self, *arguments: Any, **named: Any) -> torch.nn.Module:
        model = super().build_model(*arguments, **named)
        for parameter in model.parameters():  # torch's norms are fp32 whatever they are told
            parameter.data = parameter.data.to(torch.float64)
        return model


def arguments_of(case: Case, folder: Path) -> SimpleNamespace:
    """ms-swift's arguments with its own defaults, resolved as its __post_init__ does for this case."""
    defaults = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(MegatronRLHFArguments)
    }
    values = {
        "model_type": "qwen3",
        "is_multimodal": False,
        "megatron_model_meta": get_model_meta("gpt"),
        "model_dir": str(folder),
        "ref_model": str(folder / "ref"),
        "rlhf_type": "grpo",
        "attention_backend": AttnBackend.flash,
        "task_type": "causal_lm",
        "torch_dtype": torch.float64,
        "bf16": False,
        "fp16": False,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "use_distributed_optimizer": False,
        "overlap_grad_reduce": False,
        "overlap_p2p_comm": False,
        "batch_p2p_comm": False,
        "overlap_param_gather": False,
        "micro_batch_size": SIZE,
        "num_generations": 2,
        "global_batch_size": len(SEQUENCES) * mpu.get_data_parallel_world_size(),
        "num_microbatches": len(SEQUENCES) // SIZE,
        "steps_per_generation": 2,  # so that nothing is logged at this step
        "generation_batch_size": 16,
        "per_device_generation_batch_size": 8,
        "beta": 0.1,
        "loss_type": "grpo",
        "log_entropy": True,
        "padding_free": case.padding_free,
        "sequence_parallel": case.sequence_parallel,
        "tensor_model_parallel_size": case.sizes.tp,
        "pipeline_model_parallel_size": case.sizes.pp,
        "context_parallel_size": case.sizes.cp,
    }
    return SimpleNamespace(**(defaults | values | case.arguments))


def template_of(case: Case) -> Template:
    """A template that only collates: it gets token ids, so it has no tokenizer."""
    template: Any = Template.__new__(Template)
    template.config, template.processor = CONFIG, SimpleNamespace(pad_token_id=0)
    template.mode, template.task_type, template.padding_side = "train", "causal_lm", "right"
    template.use_megatron, template.packing, template.remove_unused_columns = True, False, True
    template.padding_free, template.sequence_parallel_size = case.padding_free, case.sizes.cp
    return template


def trainer_of(kind: type[MegatronGRPOTrainer], case: Case, folder: Path) -> Any:
    """A trainer as its __init__ leaves it, without the sampler, the rewards and the optimizer."""
    trainer: Any = kind.__new__(kind)
    trainer.args, trainer.template, trainer.device = arguments_of(case, folder), template_of(case), torch.device("cpu")
    trainer.enable_routing_replay, trainer.disable_rollout_importance_sampling = False, False
    trainer.temperature, trainer.max_completion_length, trainer._step = 0.7, 16, 0
    trainer._metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
    trainer._setup_teacher()
    seed_everything(7)
    trainer.prepare_model()
    trainer._init_grpo_params()
    # gloo cannot average; data-parallel ranks of these tests hold the same sequences
    trainer._all_reduce_metric = lambda metric: metric
    for model in trainer.wrapped_models:
        model.train()
        model.config.finalize_model_grads_func = finalize_model_grads
    return trainer


def micro_batches(trainer: Any) -> list[dict[str, Any]]:
    """A step's micro-batches as `_generate_and_score_completions` makes them of what was sampled."""
    batches = []
    for first in range(0, len(SEQUENCES), SIZE):
        samples = []
        for prompt, response, tool, more in SEQUENCES[first : first + SIZE]:
            ids = [*prompt, *response, *tool, *more]
            labels = [*[-100] * len(prompt), *response, *[-100] * len(tool), *more]
            encoded = {"input_ids": ids, "labels": labels, "length": len(ids)}
            samples.append(GRPOSample(messages=[], encoded=encoded))
        inputs, grpo_batch = collate_to_grpo_micro_batch(
            samples, trainer.template, device=trainer.device, padding_to=get_padding_to(trainer.args)
        )
        batch = trainer._maybe_compute_logps({**inputs, "grpo_batch": grpo_batch})
        mask = grpo_batch.completion_mask
        grpo_batch.advantages = torch.tensor(ADVANTAGES[first : first + SIZE])[:, None] * mask
        batches.append(batch)
    tokens = sum(int(batch["grpo_batch"].completion_mask.sum()) for batch in batches)
    for batch in batches:
        batch["grpo_batch"].num_items_in_batch = torch.tensor(tokens * mpu.get_data_parallel_world_size())
    return batches


def step(trainer: Any) -> dict[str, Any]:
    """Old and reference log-probs, loss, entropy and gradients of one step, through megatron-core's schedule."""
    for model in trainer.wrapped_models:
        model.zero_grad_buffer()
    batches = micro_batches(trainer)
    last = mpu.is_pipeline_last_stage()
    found: dict[str, Any] = {}
    for name in ("old", "ref"):
        groups = [batch["grpo_batch"] for batch in batches]
        rows = [getattr(group, f"{name}_per_token_logps") for group in groups]
        if rows[0] is not None:
            found[name] = torch.cat([row[g.completion_mask] for row, g in zip(rows, groups, strict=True)])
    for batch in batches if last else []:  # as if the policy had moved since it sampled: some ratios are clipped
        old, mask = batch["grpo_batch"].old_per_token_logps, batch["grpo_batch"].completion_mask
        old[mask] += torch.linspace(-0.3, 0.3, int(mask.sum())).to(old)
    metrics = get_forward_backward_func()(
        forward_step_func=trainer.forward_step,
        data_iterator=iter(batches),
        model=trainer.wrapped_models,
        num_microbatches=len(batches),
        seq_length=64,
        micro_batch_size=SIZE,
        forward_only=False,
    )
    for name in ("loss", "entropy/entropy_mean"):
        if last and name in metrics[0]:
            found[name] = torch.stack([each[name] for each in metrics])
    parameters = whole_model_parameters(trainer.wrapped_models)
    found["gradients"] = {name: each.main_grad.clone() for name, each in parameters.items() if each.requires_grad}
    return found


def run(kind: type[MegatronGRPOTrainer], case: Case, loader: type[ModelLoader], folder: Path) -> dict[str, Any]:
    """One step of a new trainer; ``loader`` is registered first, as mcore-bridge's own for the model type."""
    register_model(replace(get_model_meta("gpt"), loader=loader), exist_ok=True)
    return step(trainer_of(kind, case, folder))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Largest absolute difference of what this stage has, and of gradients the worst relative one."""
    gradients, references = found.pop("gradients"), expected.pop("gradients")
    assert gradients.keys() == references.keys() and found.keys() == expected.keys()
    result = {name: (found[name] - value).abs().max().item() for name, value in expected.items()}
    assert all(value.norm() > 0 for value in references.values())
    relative = [((gradients[name] - value).norm() / value.norm()).item() for name, value in references.items()]
    return result | {"gradients": max(relative)}


def compare(names: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """On every rank: what each case finds. Weights go to and come from ``folder``, as Hugging Face folders."""
    fill_fresh_memory_with_nan()
    torch.set_num_threads(1)
    start()
    for seed, path in enumerate((folder, folder / "ref")):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(CONFIG).double().save_pretrained(path)  # one rank does
    torch.distributed.barrier()
    return {name: CASES[name](folder) for name in names}


def _at(sizes: ParallelSizes) -> None:
    mpu.destroy_model_parallel()
    initialize(sizes)


def packed(folder: Path) -> dict[str, float]:
    """ms-swift's default frame on one rank."""
    _at(ParallelSizes())
    case = Case()
    expected = run(MegatronGRPOTrainer, case, PackedLoader, folder)
    return differences(run(PrefixGRPOTrainer, case, ModelLoader, folder), expected)


def losses(folder: Path) -> dict[str, float]:
    """Every loss type, masks by entropy, ratios by sequence, no reference model: the worst differences."""
    _at(ParallelSizes())
    ways = [{"loss_type": name} for name in LOSS_TYPES]
    ways += [
        {"top_entropy_quantile": 0.5},
        {"importance_sampling_level": "sequence"},
        {"beta": 0.0, "log_entropy": False},
    ]
    kinds = ((MegatronGRPOTrainer, PackedLoader), (PrefixGRPOTrainer, ModelLoader))
    worst: dict[str, float] = {}
    expected, found = ([step(trainer) for trainer in _trainers(kind, loader, ways, folder)] for kind, loader in kinds)
    for mine, theirs in zip(found, expected, strict=True):
        for name, value in differences(mine, theirs).items():
            worst[name] = max(value, worst.get(name, 0.0))
    return worst


def _trainers(
    kind: type[MegatronGRPOTrainer], loader: type[ModelLoader], ways: list[dict[str, Any]], folder: Path
) -> Iterator[Any]:
    """One trainer after the other with the arguments of each way; of one model."""
    register_model(replace(get_model_meta("gpt"), loader=loader), exist_ok=True)
    trainer = trainer_of(kind, Case(), folder)
    usual = dict(vars(trainer.args))
    for way in ways:
        vars(trainer.args).update(usual | way)
        trainer._init_grpo_params()
        yield trainer


def pipeline(folder: Path) -> dict[str, float]:
    """Two stages, every layer recomputed in backward (ms-swift's default is the core attention)."""
    _at(ParallelSizes(pp=2))
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    case = Case(ParallelSizes(pp=2), arguments=recompute)
    expected = run(MegatronGRPOTrainer, case, PackedLoader, folder)
    return differences(run(PrefixGRPOTrainer, case, ModelLoader, folder), expected)


def context(folder: Path) -> dict[str, float]:
    """Two context-parallel ranks, against one: the oracle's attention has no ranks."""
    _at(ParallelSizes())
    expected = run(MegatronGRPOTrainer, Case(), PackedLoader, folder)
    _at(ParallelSizes(cp=2))
    return differences(run(PrefixGRPOTrainer, Case(ParallelSizes(cp=2)), ModelLoader, folder), expected)


def tensor(folder: Path) -> dict[str, float]:
    """Two tensor-parallel ranks with sequence parallelism, sequences padded; weights drawn, not loaded."""
    _at(ParallelSizes(tp=2))
    drawn = {
        "mcore_model": "drawn",
        "mcore_ref_model": "drawn",
        "perform_initialization": True,
        "persist_layer_norm": False,
    }
    case = Case(ParallelSizes(tp=2), padding_free=False, sequence_parallel=True, arguments=drawn)
    expected = run(MegatronGRPOTrainer, case, LocalLoader, folder)
    return differences(run(PrefixGRPOTrainer, case, LocalLoader, folder), expected)


def lora(folder: Path) -> dict[str, float]:
    """Adapters, away from where they start; the reference is the model without them. Fused layers need the real TE."""
    _at(ParallelSizes())
    targets = ["linear_proj", "linear_fc2"]
    arguments = {"tuner_type": "lora", "target_modules": targets, "lora_rank": 4, "lora_dropout": 0.0}
    steps = []
    for kind, loader in ((MegatronGRPOTrainer, PackedLoader), (PrefixGRPOTrainer, ModelLoader)):
        register_model(replace(get_model_meta("gpt"), loader=loader), exist_ok=True)
        trainer = trainer_of(kind, Case(arguments=arguments), folder)
        with torch.no_grad():
            for parameter in trainer.unwrapped_models[0].parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        steps.append(step(trainer))
    assert all("lora" in name for name in steps[0]["gradients"])
    return differences(steps[1], steps[0])


def script(folder: Path) -> dict[str, list[str]]:
    """Options of the example's command that ms-swift does not have."""
    text = (ROOT / "examples" / "ms_swift" / "grpo.sh").read_text()
    options = set(re.findall(r"^ +--(\w+)", text, re.MULTILINE))
    assert {"external_plugins", "micro_batch_size"} <= options
    return {"unknown": sorted(options - {each.name for each in fields(MegatronRLHFArguments)})}


def refused(folder: Path) -> dict[str, str]:
    """What is said where prefix groups cannot be had; the plugin's trainer is found as ms-swift finds its own."""
    _at(ParallelSizes())
    meta = get_model_meta("gpt")

    def message(attempt: Callable[[], Any]) -> str:
        try:
            attempt()
        except ValueError as error:
            return str(error)
        return ""

    def trained(**arguments: Any) -> Any:
        register_model(replace(meta, loader=ModelLoader), exist_ok=True)
        return trainer_of(PrefixGRPOTrainer, Case(arguments=arguments), folder)

    class OtherModel(torch.nn.Module):
        """Not a plain GPT."""

    class OtherLoader(ModelLoader):
        model_cls = OtherModel

    import_external_file(str(ROOT / "examples" / "ms_swift" / "plugin.py"))
    args = arguments_of(Case(arguments={"micro_batch_size": 3}), folder)
    pipeline = SimpleNamespace(args=args, template=template_of(Case()), _prepare_vllm_client=lambda: None)
    return {
        "plugin": message(lambda: MegatronRLHF.prepare_trainer(pipeline)),
        "moe": message(lambda: trained(megatron_extra_kwargs={"moe_z_loss_coeff": 0.1})),
        "mtp": message(lambda: trained(mtp_num_layers=1)),
        "model type": message(lambda: share_prefixes("no such type")),
        "model": message(lambda: prefix_loader(OtherLoader)(SimpleNamespace(mcore_model_type="other"))),
        "twice": str(prefix_loader(prefix_loader(ModelLoader)).__mro__.count(PrefixLoader)),
    }


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    each.__name__: each for each in (packed, losses, pipeline, context, tensor, lora, refused, script)
}
