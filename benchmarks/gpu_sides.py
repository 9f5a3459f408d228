"""The models of ``gpu.py``, and its sides: a Trainer with MegatronStrategy, a loop by hand, and transformers."""

import resource
import time
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from kernel_kinds import shares
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.utils.data import DataLoader

from lightning_megatron import Experts, GPTConfig, GPTModule, Kernels, LoRA, MegatronStrategy, ParallelLayout
from lightning_megatron.distributed import process_group_backends, process_groups
from lightning_megatron.distributed.device import use_device
from lightning_megatron.models.build_settings import BuildSettings
from lightning_megatron.models.flops import training_flops
from lightning_megatron.training.gradient_norm import clip_gradients, gradient_norm
from lightning_megatron.training.optimizer_factory import shard_optimizer

CLIP, SEED = 1.0, 1
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
GPT2 = {"activation": "gelu_tanh"}
LLAMA = {"position_embedding": "rope", "normalization": "RMSNorm", "activation": "swiglu", "bias": False}


@dataclass(frozen=True)
class Model:
    """A model and the batch of one optimizer step: ``rows`` of ``seq_length`` tokens, ``micro_batch`` at a time."""

    layers: int
    hidden: int
    heads: int
    rows: int
    seq_length: int
    micro_batch: int
    steps: int = 8  # timed steps
    ffn: int | None = None
    groups: int | None = None
    vocab: int = 32000
    family: dict[str, Any] = field(default_factory=lambda: LLAMA)
    tied: bool = True
    lora: int | None = None  # the rank of low-rank updates
    experts: Experts | None = None

    def tiny(self) -> "Model":
        """The same kind of model and the same number of micro-batches, for a test without a GPU."""
        return replace(
            self, layers=2, hidden=64, heads=4, ffn=None if self.ffn is None else 128, vocab=512, seq_length=32,
            groups=None if self.groups is None else 2, rows=2 * min(2, self.rows // self.micro_batch),
            micro_batch=2, steps=2, lora=None if self.lora is None else 2,
            experts=self.experts and replace(self.experts, num=4, ffn_hidden_size=64),
        )  # fmt: skip

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(
            num_layers=self.layers, hidden_size=self.hidden, num_attention_heads=self.heads, vocab_size=self.vocab,
            seq_length=self.seq_length, ffn_hidden_size=self.ffn, num_query_groups=self.groups,
            tie_embeddings=self.tied, experts=self.experts, **self.family,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.rows * self.seq_length

    @property
    def flops(self) -> float:
        """Floating-point operations of one step; frozen weights have no gradients, a third of their products."""
        whole = self.rows * training_flops(self.config, (self.seq_length,))
        if self.lora is None:
            return whole
        scores = self.rows * self.layers * 12 * self.seq_length * (self.seq_length / 2) * self.hidden
        return whole - (whole - scores) / 3


MODELS = {
    "124M": Model(12, 768, 12, rows=64, seq_length=1024, micro_batch=16, vocab=50257, family=GPT2),
    "1B": Model(16, 2048, 16, rows=16, seq_length=2048, micro_batch=4, ffn=8192, groups=8),
    "1B, 32k tokens": Model(16, 2048, 16, rows=2, seq_length=32768, micro_batch=1, steps=2, ffn=8192, groups=8),
    "3B": Model(28, 3072, 24, rows=16, seq_length=2048, micro_batch=2, steps=3, ffn=8192, groups=8),
    "8B, LoRA": Model(
        32, 4096, 32, rows=8, seq_length=4096, micro_batch=1, steps=2, ffn=14336, groups=8, vocab=128256, tied=False,
        lora=16,
    ),
    # 506M weights, of which a token uses 166M; balanced in each sequence, so that a loop by hand balances alike.
    "8 x 160M": Model(
        12, 768, 12, rows=64, seq_length=1024, micro_batch=16,
        experts=Experts(num=8, top_k=2, ffn_hidden_size=2048, balancing="seq_aux"),
    ),
}  # fmt: skip


class Meter(pl.Callback):
    """Times the steps behind the warm-up, once the device has finished its work, and takes the peak of its memory."""

    def __init__(self, model: Model, device: torch.device, warm_up: int, profile: bool) -> None:
        self.model, self.device, self.warm_up = model, device, warm_up
        self.profiler = None
        if profile:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
            self.profiler = torch.profiler.profile(activities=kinds, acc_events=True)
        self.step = -1

    @property
    def steps(self) -> int:
        """All steps, the warm-up included."""
        return self.warm_up + self.model.steps

    def starts(self, step: int) -> None:
        """Note that an optimizer step begins; steps are numbered from 0."""
        if step == self.step:  # a further batch of an accumulation window
            return
        self.step = step
        if step in (0, 1, self.warm_up):
            now = self._now()
        if step == 0:
            self.began = now
        if step == 1:
            self.first_step = now - self.began
        if step == self.warm_up:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if self.profiler is not None:
                self.profiler.start()
            self.start = self._now()

    def ends(self) -> None:
        """Note that the last step is done."""
        self.seconds = self._now() - self.start
        if self.profiler is not None:
            self.profiler.stop()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.starts(trainer.global_step)

    def on_train_end(self, trainer, module):
        self.ends()

    def result(self, loss: Any = None) -> dict[str, Any]:
        """What was measured."""
        each = self.seconds / self.model.steps
        cuda = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1e3
        found = {
            "tokens_per_second": self.model.tokens / each, "tflops": self.model.flops / each / 1e12,
            "ms_per_step": each * 1e3, "peak_memory_gb": memory / 1e9, "first_step_s": self.first_step,
            "loss": None if loss is None else float(loss),
        }  # fmt: skip
        if self.profiler is not None:
            found["shares"] = shares(self.profiler, self.seconds, cuda)
        return found

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def loader(model: Model, batch: int, steps: int, pinned: bool) -> DataLoader:
    """Random tokens for ``steps`` optimizer steps, ``batch`` rows at a time."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(model.vocab, (steps * model.rows, model.seq_length), generator=generator)
    return DataLoader([{"input_ids": row} for row in tokens], batch_size=batch, pin_memory=pinned)


def trainer(device: torch.device, meter: Meter, **arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator=device.type, devices=1, max_steps=meter.steps, gradient_clip_val=CLIP, callbacks=[meter],
        use_distributed_sampler=False, **QUIET, **arguments,
    )  # fmt: skip


def with_strategy(model: Model, meter: Meter, kernels: Kernels, recompute: str | None) -> dict[str, Any]:
    """A Trainer with MegatronStrategy."""
    pl.seed_everything(SEED, verbose=False)
    strategy = MegatronStrategy(micro_batch_size=model.micro_batch, kernels=kernels, recompute=recompute)
    run = trainer(meter.device, meter, strategy=strategy, precision="bf16-mixed")
    module = GPTModule(model.config, optimizer=adamw, lora=None if model.lora is None else LoRA(rank=model.lora))
    run.fit(module, loader(model, model.rows, meter.steps, meter.device.type == "cuda"))
    return meter.result(run.callback_metrics["train_loss"])


def by_hand(model: Model, meter: Meter, kernels: Kernels, recompute: str | None) -> dict[str, Any]:
    """The same chunk of layers with the same kernels, in a loop written on megatron-core."""
    pl.seed_everything(SEED, verbose=False)
    device = meter.device if meter.device.type == "cpu" else torch.device("cuda", 0)
    module, ddp, optimizer = _built_by_hand(model, device, kernels, recompute)
    run = get_forward_backward_func()
    batches = iter(loader(model, model.rows, meter.steps, device.type == "cuda"))

    def forward(parts, chunk):
        total, tokens = module.training_step(next(parts), 0)  # of the chunk within
        return total, partial(_with_tokens, tokens)

    for step, batch in enumerate(batches):
        meter.starts(step)
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        tokens = batch["input_ids"].to(device, non_blocking=True)
        parts = [{"input_ids": part} for part in tokens.split(model.micro_batch)]
        seen = run(
            forward_step_func=forward, data_iterator=iter(parts), model=ddp, num_microbatches=len(parts),
            seq_length=model.seq_length, micro_batch_size=model.micro_batch, forward_only=False,
        )  # fmt: skip
        optimizer.prepare_grads()
        clip_gradients(optimizer, CLIP, gradient_norm(optimizer, device))
        optimizer.step_with_ready_grads()
    meter.ends()
    total, count = torch.stack([one["loss"] for one in seen]).sum(0)
    return meter.result(total / count)


def _built_by_hand(model: Model, device: torch.device, kernels: Kernels, recompute: str | None) -> tuple[Any, Any, Any]:
    """The module with its chunk on the device, the chunk's data parallelism, and megatron-core's optimizer."""
    use_device(device)
    process_group_backends.init_for_build(device)
    layout = ParallelLayout(world_size=1)
    process_groups.build(layout)
    process_groups.seed(SEED)
    module = GPTModule(model.config, lora=None if model.lora is None else LoRA(rank=model.lora))
    module.settings = BuildSettings(
        layout=layout, params_dtype=torch.bfloat16, recompute=recompute, kernels=kernels.on(device), device=device
    )
    module.configure_model()
    chunk = module.to(device, torch.bfloat16).chunks[0]
    config = chunk.config
    wanted = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(config, wanted, chunk)
    optimizer = shard_optimizer(
        adamw(parameter for parameter in ddp.parameters() if parameter.requires_grad),
        SimpleNamespace(chunks=[ddp], config=config, layout=layout), params_dtype=torch.bfloat16,
        distributed=True, initial_loss_scale=None, on_nonfinite="ignore",
    ).inner  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    return module, ddp, optimizer


def _with_tokens(tokens, total):
    return total, tokens.int(), {"loss": torch.stack([total.detach(), tokens])}


class Transformers(pl.LightningModule):
    """transformers' model of the same shape, with SDPA."""

    def __init__(self, model: Model, compiles: bool) -> None:
        super().__init__()
        self.shape, self.compiles = model, compiles
        self.model = None

    def configure_model(self):
        if self.model is not None:
            return
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_config(_transformers_config(self.shape), attn_implementation="sdpa")
        if self.shape.lora is not None:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=self.shape.lora, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = get_peft_model(self.model, lora)
        if self.compiles:
            self.model.compile()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss

    def configure_optimizers(self):
        return adamw(parameter for parameter in self.parameters() if parameter.requires_grad)


def _transformers_config(model: Model) -> Any:
    from transformers import GPT2Config, LlamaConfig, MixtralConfig

    if model.family is GPT2:
        return GPT2Config(
            vocab_size=model.vocab, n_positions=model.seq_length, n_embd=model.hidden, n_layer=model.layers,
            n_head=model.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    sizes = {
        "vocab_size": model.vocab, "max_position_embeddings": model.seq_length, "hidden_size": model.hidden,
        "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups or model.heads, "tie_word_embeddings": model.tied,
    }  # fmt: skip
    if model.experts is None:
        return LlamaConfig(**sizes, intermediate_size=model.ffn)
    return MixtralConfig(
        **sizes, intermediate_size=model.experts.ffn_hidden_size, num_local_experts=model.experts.num,
        num_experts_per_tok=model.experts.top_k, output_router_logits=True,
    )  # fmt: skip


def with_transformers(model: Model, meter: Meter, compiles: bool) -> dict[str, Any]:
    """Vanilla Lightning with transformers' model in bf16; micro-batches are accumulated batches."""
    pl.seed_everything(SEED, verbose=False)
    window = model.rows // model.micro_batch
    run = trainer(meter.device, meter, precision="bf16-true", accumulate_grad_batches=window)
    run.fit(Transformers(model, compiles), loader(model, model.micro_batch, meter.steps, meter.device.type == "cuda"))
    return meter.result()
