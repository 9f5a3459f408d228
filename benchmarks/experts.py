"""Measures a small mixture of experts on one process: MegatronStrategy, megatron-core by hand, transformers' Mixtral.

All have the same shape, batch and optimizer, fp32. The loop by hand has megatron-core's ``SequentialMLP``, which is all
that runs on a CPU. The sides run in turn in this process; printed is the processor time of a step, which other work
on the machine disturbs less than the clock, and the ratio to MegatronStrategy's.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import lightning.pytorch as pl
import torch
from timing import QUIET, WARM_UP, Clock, adamw
from torch.utils.data import DataLoader

from lightning_megatron import Experts, GPTConfig, GPTModule, MegatronStrategy, ParallelLayout

ROWS, CLIP = 8, 1.0
CONFIG = GPTConfig(
    num_layers=4, hidden_size=256, num_attention_heads=8, num_query_groups=4, vocab_size=512, seq_length=256,
    position_embedding="rope", normalization="RMSNorm", activation="swiglu", bias=False, tie_embeddings=False,
    experts=Experts(num=8, top_k=2, ffn_hidden_size=512, balancing="seq_aux"),
)  # fmt: skip


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(512, (CONFIG.seq_length,), generator=generator)} for _ in range(count)]


class Mixtral(pl.LightningModule):
    """transformers' model, whose experts it computes as it chooses."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import MixtralConfig, MixtralForCausalLM

        self.model = MixtralForCausalLM(
            MixtralConfig(
                hidden_size=CONFIG.hidden_size, intermediate_size=CONFIG.experts.ffn_hidden_size,
                num_hidden_layers=CONFIG.num_layers, num_attention_heads=CONFIG.num_attention_heads,
                num_key_value_heads=CONFIG.num_query_groups, vocab_size=CONFIG.vocab_size,
                num_local_experts=CONFIG.experts.num, num_experts_per_tok=CONFIG.experts.top_k,
                max_position_embeddings=CONFIG.seq_length, output_router_logits=True, use_cache=False,
                attn_implementation="sdpa",
            )
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def configure_optimizers(self):
        return adamw(self.parameters())


def with_trainer(module: pl.LightningModule, strategy, steps: int) -> list[float]:
    """Processor time of each step, in seconds."""
    clock = Clock()
    run = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=steps + WARM_UP, gradient_clip_val=CLIP,
        callbacks=[clock], **QUIET,
    )  # fmt: skip
    run.fit(module, DataLoader(samples(ROWS * (steps + WARM_UP)), batch_size=ROWS))
    return clock.processor


def by_hand(steps: int) -> list[float]:
    """The same sizes in megatron-core's own layers, without a Trainer."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from lightning_megatron.distributed import process_group_backends, process_groups
    from lightning_megatron.distributed.device import use_device

    cpu = torch.device("cpu")
    use_device(cpu)
    process_group_backends.init_for_build(cpu)
    process_groups.build(ParallelLayout(world_size=1))
    process_groups.seed(1)
    config = TransformerConfig(
        num_layers=CONFIG.num_layers, hidden_size=CONFIG.hidden_size, num_attention_heads=CONFIG.num_attention_heads,
        num_query_groups=CONFIG.num_query_groups, num_moe_experts=CONFIG.experts.num, moe_router_topk=2,
        moe_ffn_hidden_size=CONFIG.experts.ffn_hidden_size, moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-2, moe_token_dispatcher_type="alltoall", normalization="RMSNorm", add_bias_linear=False,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0,
        bias_activation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, gradient_accumulation_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=CONFIG.experts.num, moe_grouped_gemm=False, normalization="RMSNorm")
    model = GPTModel(
        config, spec, CONFIG.vocab_size, CONFIG.seq_length, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    optimizer, found = adamw(model.parameters()), []
    places = torch.arange(CONFIG.seq_length).expand(ROWS, -1)
    sees_not = torch.ones(CONFIG.seq_length, CONFIG.seq_length, dtype=torch.bool).triu(1)[None, None]
    for batch in DataLoader(samples(ROWS * (steps + WARM_UP)), batch_size=ROWS):
        start = time.process_time()
        ids = batch["input_ids"]
        losses = model(ids, places, sees_not, labels=ids.roll(-1, 1))
        losses[:, :-1].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.process_time() - start)
    return found[WARM_UP:]


SIDES: dict[str, Callable[[int], list[float]]] = {
    "MegatronStrategy": lambda steps: with_trainer(GPTModule(CONFIG, optimizer=adamw), MegatronStrategy(), steps),
    "megatron-core by hand": by_hand,
    "transformers' Mixtral": lambda steps: with_trainer(Mixtral(), "auto", steps),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="", help="a part of the name of the side to run")
    args = parser.parse_args()
    seen: dict[str, list[float]] = {name: [] for name in SIDES if args.only in name}
    for _ in range(args.rounds):
        for name, times in seen.items():
            times += SIDES[name](args.steps)
    print(f"processor time of a step of {ROWS * CONFIG.seq_length:,} tokens, load {os.getloadavg()[0]:.1f}")
    ours = {which: which(next(iter(seen.values()))) for which in (statistics.median, min)}
    for name, times in seen.items():
        each = ", ".join(
            f"{which.__name__} {which(times) * 1e3:.0f} ms ({which(times) / ours[which]:.2f})" for which in ours
        )
        print(f"  {name}: {each}", flush=True)


if __name__ == "__main__":
    main()
