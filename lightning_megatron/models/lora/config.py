"""``LoRA``: which layers get low-rank updates, and of which size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lightning_megatron.checkpoint.plain_classes import formerly_in, plain_class
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.distributed.suggestions import did_you_mean

ALL = "all-linear"


@answer_wrong_names
@plain_class
@formerly_in("lightning_megatron.lora.config")
@dataclass(kw_only=True)
class LoRA:
    """Low-rank updates of linear layers, trained while all else is frozen (https://arxiv.org/abs/2106.09685).

    A layer's weight ``W`` becomes ``W + scale · B A``; ``A`` is ``[rank, in]`` and ``B`` ``[out, rank]``.

    Args:
        rank: Rank of the updates.
        alpha: ``scale`` is ``alpha / rank``, or ``alpha / √rank`` with ``rslora``.
        targets: Names of layers, as the family of transformers has them ("q_proj", "self_attn.q_proj") or megatron-core
            ("linear_qkv"), each of which matches where a name ends with it; or one regular expression of whole names;
            or "all-linear", all but the output layer. Of experts, each has an update of its own; routers have none.
        dropout: Probability of leaving an input of the updates out.
        rslora: Whether ``scale`` is ``alpha / √rank`` (https://arxiv.org/abs/2312.03732).
        also_train: Parts of the model that are trained whole, by megatron-core's names, such as "classification_head".
            A head that a pretrained model did not have is trained in any case.

    Raises:
        ValueError: A number that is out of range, or no target.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] | str = ALL
    dropout: float = 0.0
    rslora: bool = False
    also_train: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse numbers that make no update."""
        arguments = Arguments("LoRA")
        arguments.whole(rank=self.rank)
        arguments.number(alpha=self.alpha, dropout=self.dropout)
        arguments.flag(rslora=self.rslora)
        if self.alpha <= 0:
            raise ValueError(f"LoRA(alpha={self.alpha}): use a number above 0, such as 2 · rank.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA(dropout={self.dropout}): use a probability, from 0 to below 1.")
        arguments.names(also_train=self.also_train)
        if not isinstance(self.targets, str):
            arguments.names(targets=self.targets)
        if not self.targets:
            raise ValueError(f"LoRA(targets={self.targets!r}): name layers, or use {ALL!r}.")

    @property
    def scale(self) -> float:
        """The factor that the updates are multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def matches(self, *names: str) -> bool:
        """Whether a layer is a target, by one of its names."""
        if self.targets == ALL:
            return True
        if isinstance(self.targets, str):
            return any(re.fullmatch(self.targets, name) for name in names)
        return any(name == target or name.endswith(f".{target}") for target in self.targets for name in names)

    def check_targets(self, names: Iterable[str], routers: Sequence[str] = ()) -> None:
        """Refuse targets that are no layer's.

        Args:
            names: All names of all linear layers of the model.
            routers: Those of its routers, which have no updates.

        Raises:
            ValueError: Names the nearest that there are.
        """
        every = list(names)
        asked = [self.targets] if isinstance(self.targets, str) else self.targets
        for target in asked:
            one = LoRA(targets=target if isinstance(self.targets, str) else [target])
            if not any(one.matches(name) for name in every):
                if any(one.matches(name) for name in routers):
                    raise ValueError(
                        f"LoRA(targets={self.targets!r}): {target!r} is a router of experts, which has no low-rank"
                        " update here. Leave it frozen, or train it whole: also_train="
                        f"{[name for name in routers if name.endswith('.mlp.router')]}."
                    )
                known = sorted({name.rpartition(".")[2] for name in every})
                hint = did_you_mean(target.rpartition(".")[2], known)
                raise ValueError(
                    f"LoRA(targets={self.targets!r}): no layer is called {target!r}.{hint} There are"
                    f" {', '.join(known)}."
                )
