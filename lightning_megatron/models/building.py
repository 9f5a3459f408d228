"""``ChunkedModule``: a LightningModule whose model is built as chunks, one for each virtual stage of this rank."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self

import lightning.pytorch as pl
import torch
from typing_extensions import override

from lightning_megatron.checkpoint import local_path, without_trainer
from lightning_megatron.distributed import parameter_names, process_group_backends, process_groups
from lightning_megatron.distributed.device import model_rng, use_device
from lightning_megatron.distributed.layout import LayoutError, ParallelLayout
from lightning_megatron.models import model_needs
from lightning_megatron.models.build_settings import BuildSettings, differences
from lightning_megatron.models.kernels import Kernels
from lightning_megatron.models.layers.attention import use_kernel
from lightning_megatron.models.layers.recomputation import recompute_norms
from lightning_megatron.models.layers.rope_scaling import move_rotary
from lightning_megatron.models.recompute import Recompute
from lightning_megatron.training import weight_gradients


class ChunkedModule(pl.LightningModule):
    """Builds this rank's chunks of a model, under a Trainer or without one, and gives them their first weights."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: BuildSettings | None = None
        self.built_for: BuildSettings | None = None
        self._fill: Callable[[Any], None] | None = None  # gives a built model its first weights
        self.chunks = torch.nn.ModuleList()
        self.active_chunk = 0  # set by the strategy before each call: which virtual stage runs

    # What a subclass changes

    @abstractmethod
    def build_model(self, pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
        """Build one chunk of the model.

        Args:
            pre_process: Whether the chunk holds the embedding.
            post_process: Whether it holds the output layer.
            vp_stage: Number of the chunk on this pipeline stage under interleaving, else None.
        """

    def draw_weights(self) -> None:
        """Draw the first weights of the chunks, which are built, where ``build_model`` has left it to this."""

    def adapt_model(self) -> None:
        """Change the chunks, which are built and have no weights of a checkpoint's yet."""

    def fill_model(self) -> None:
        """Give the built chunks their first weights, from the source that this module was given."""
        if self._fill is not None:
            self._fill(self)

    def connect_data(self, data: Any) -> None:
        """Take from the data module, or None, what the model leaves to it; called before anything is built."""

    def complete_layout(self, layout: ParallelLayout, recompute: Recompute | None = None) -> ParallelLayout:
        """Add to the sizes what only the model knows: the layers of each stage, the split of an encoder-decoder.

        Args:
            layout: The parallel sizes.
            recompute: As ``MegatronStrategy(recompute=)`` has it.

        Raises:
            LayoutError: A split or balanced stages were asked for, and the model cannot say them; or they do not fit.
        """
        if layout.layers_per_stage == "auto":
            raise layout.error(
                f"'auto' reads how long layers take from the configuration of a GPT, BERT or T5, and"
                f" {type(self).__name__} is a model of your own. Use layers_per_stage=[...]."
            )
        if layout.pipeline_split_rank is not None:
            raise LayoutError(
                f"MegatronStrategy(pipeline_split_rank={layout.pipeline_split_rank}) splits the pipeline of"
                f" encoder-decoder models, and {type(self).__name__} is not one. Leave it out."
            )
        return layout

    def check_layout(self, layout: ParallelLayout) -> None:
        """Refuse sizes that ``layout`` cannot divide; called before a process group exists.

        Raises:
            LayoutError: The sizes do not fit; the message has the nearest ones that do.
        """

    # Building

    def configure_model(self) -> None:
        """Build this rank's chunks, once."""
        if len(self.chunks):
            self._check_built_for(self.build_settings)
            return
        self.built_for = self.build_settings
        layout = self.build_settings.layout
        stage = self._pipeline_stage
        for virtual in range(layout.vp or 1):
            first = stage == 0 and virtual == 0
            last = stage == layout.pp - 1 and virtual == (layout.vp or 1) - 1
            with model_rng(), self.build_settings.device:
                chunk = self.build_model(first, last, virtual if layout.vp else None)
            model_needs.check_built(self, chunk)
            self.chunks.append(chunk)
            recompute_norms(chunk)
        model_needs.check_chunks(self, self.build_settings, stage)
        self.draw_weights()
        settings = self.build_settings
        use_kernel(self.chunks, settings.kernels.attention, settings.params_dtype, settings.device)
        with self.build_settings.device:
            self.adapt_model()
        if self.build_settings.kernels.fused_weight_gradients:
            weight_gradients.fuse(self.chunks)
        with torch.device("cpu"):  # files are read there
            self.fill_model()

    def build(
        self,
        tp: int = 1,
        pp: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        layers_per_stage: Sequence[int] | str | None = None,
    ) -> Self:
        """Build the model outside of a Trainer, on the ranks that torchrun has started, or on this process alone.

        It has the weights that ``from_pretrained`` or ``load_weights`` has named, or new ones. Ranks beyond
        ``tp · pp`` hold further copies.

        Args:
            tp: Tensor-parallel size.
            pp: Pipeline-parallel size.
            device: The device to build on; None takes this rank's GPU, or the CPU where there is none.
            dtype: Type of the weights.
            layers_per_stage: The layers of each pipeline stage, as ``MegatronStrategy`` takes them.

        Returns:
            The module, in eval mode.

        Raises:
            RuntimeError: The model is built already.
            LayoutError: The sizes do not fit the number of ranks, or the model.
        """
        if len(self.chunks):
            raise RuntimeError(
                f"{type(self).__name__}.build: the model is built already, for {self.built_for}. Make a new module."
            )
        self.connect_data(None)
        place = process_groups.default_device() if device is None else torch.device(device)
        use_device(place)
        process_group_backends.init_for_build(place)
        sizes = {"tp": tp, "pp": pp, "layers_per_stage": layers_per_stage}
        layout = self.complete_layout(ParallelLayout(world_size=process_groups.world_size(), **sizes))  # type: ignore[arg-type]
        self.check_layout(layout)
        process_groups.build(layout)
        process_groups.seed(torch.initial_seed())
        self.settings = BuildSettings(layout=layout, params_dtype=dtype, kernels=Kernels().on(place), device=place)
        self.configure_model()
        return self.to(place, dtype).eval()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        move_rotary(self)
        return self

    # Weights of a checkpoint

    def load_weights(self, path: Any, strict: bool = True, upcycle: bool = False) -> Self:
        """Start from the weights of a checkpoint that any layout wrote, and from nothing else of it.

        Call it before ``fit``; each rank reads its shards when the model is built.

        Args:
            path: A checkpoint's directory.
            strict: Whether every weight must be in both. With False what differs (a task's head) starts as it would
                have, and is listed.
            upcycle: Whether the checkpoint is of a dense model, and each expert of this mixture starts as a copy of the
                feed-forward layer in its place (Komatsuzaki and others, "Sparse Upcycling", 2022). Routers start as
                they would have.

        Returns:
            The module.

        Raises:
            CheckpointError: The checkpoint is not whole, or damaged. When the model is built: it differs, or there is
                nothing to upcycle.
            RuntimeError: The model is built already.
        """
        if len(self.chunks):
            raise RuntimeError(
                f"{type(self).__name__}.load_weights comes too late: the model is built. Call it on a new"
                f" {type(self).__name__}, before fit."
            )
        fill = partial(
            without_trainer.fill, path=without_trainer.verified(local_path(path)), strict=strict, upcycle=upcycle
        )
        before = None if strict else self._fill  # what the checkpoint lacks starts as it would have
        self._fill = fill if before is None else partial(_in_turn, fills=[before, fill])
        return self

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make the module of a checkpoint of any layout on this process alone: the whole model, in fp32.

        Args:
            checkpoint_path: A checkpoint's directory.
            map_location: The device; the CPU by default.
            hparams_file: Refused: the checkpoint has the arguments.
            strict: Whether every weight must be in both. None: as the module's ``strict_loading``.
            weights_only: False trusts the checkpoint and unpickles arguments that are no plain data.
            **kwargs: Arguments of ``__init__`` that were not saved (the optimizer), or are to differ.
        """
        if hparams_file is not None:
            raise TypeError(f"{cls.__name__}.load_from_checkpoint takes no hparams_file. Give the arguments by name.")
        path = local_path(checkpoint_path)
        module = without_trainer.construct(cls, path, weights_only is False, kwargs)
        module._fill = partial(
            without_trainer.fill, path=path, strict=module.strict_loading if strict is None else strict
        )
        return module.build_alone("cpu" if map_location is None else map_location).train()

    def build_alone(self, device: torch.device | str | None = None) -> Self:
        """As ``build``, of the whole model; refused on a rank of a run, whose groups it would replace.

        Raises:
            RuntimeError: This process is a rank of a larger run.
        """
        process_groups.check_single_process()
        return self.build(device=device)

    # The chunks

    @property
    def build_settings(self) -> BuildSettings:
        """The settings of the run; an error before ``MegatronStrategy`` or ``build`` has set them."""
        if self.settings is None:
            raise RuntimeError(
                f"{type(self).__name__} builds its model in a Trainer with strategy=MegatronStrategy(...), after the"
                " processes have started; another strategy has no process groups for it. Without a Trainer, call"
                f" {type(self).__name__}.build(tp=..., pp=...)."
            )
        return self.settings

    def named_shards(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters, shards as they are, under the unsharded model's names."""
        for chunk in self.chunks:
            yield from parameter_names.named_shards(chunk)

    @override
    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters; those of the model's chunks under the unsharded model's names, as ``named_shards``.

        So a condition on names holds for the same weights under every layout: layers are numbered through all pipeline
        stages and virtual stages, and the last stage's copy of a tied embedding is called as the embedding is. The keys
        of ``state_dict()`` are those of this rank's own tree.
        """
        start = f"{prefix}." if prefix else ""
        for name, parameter in super().named_parameters("", recurse, remove_duplicate):
            room, _, rest = name.partition(".")
            if room == "chunks":
                number, _, rest = rest.partition(".")
                name = parameter_names.whole_name(self.chunks[int(number)], rest)
            yield start + name, parameter

    @property
    def active_model(self) -> torch.nn.Module:
        """The chunk that the strategy is running."""
        return self.chunks[self.active_chunk]

    @property
    def on_last_stage(self) -> bool:
        """Whether the active chunk gives the model's output."""
        return bool(self.active_model.post_process)

    def _check_built_for(self, settings: BuildSettings) -> None:
        if self.built_for != settings:
            before, now = differences(self.built_for, settings)
            raise ValueError(
                f"This {type(self).__name__} was built for {before}, and this run has {now}. Make a new"
                f" {type(self).__name__}, and carry the weights over in a checkpoint (ckpt_path=)."
            )

    @property
    def _pipeline_stage(self) -> int:
        return process_groups.coordinates().pp


def _in_turn(module: Any, fills: list[Callable[[Any], None]]) -> None:
    for fill in fills:
        fill(module)
