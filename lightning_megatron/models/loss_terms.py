"""``LossTerms``: label smoothing and the z-loss, which training may add to the cross-entropy over the vocabulary."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_megatron.distributed.arguments import Arguments

# Fields of megatron-core's configuration, which `extra=` sets, that compute the loss from all logits.
WANT_LOGITS = ("cross_entropy_loss_fusion", "defer_embedding_wgrad_compute")


@dataclass(frozen=True)
class LossTerms:
    """What the loss of a token is in training; ``ε`` is ``label_smoothing``, and ``V`` the number of token ids.

    ``(1 − ε) · −log p(label) + ε / V · Σ −log p(id) + z_loss · (log Z)²``, where ``Z`` is the sum of the exponentials
    of the logits. Evaluation, which computes no gradients, has ``−log p(label)``.

    Args:
        label_smoothing: Share of each label that is spread evenly over all ids, as in ``torch.nn.CrossEntropyLoss``
            (Szegedy and others, "Rethinking the Inception Architecture", 2016, section 7).
        z_loss: Weight of ``(log Z)²``, which keeps ``log Z`` near 0; PaLM has 1e-4 (Chowdhery and others, 2022,
            section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def check_range(self, of: str) -> None:
        """Refuse numbers out of range; ``of`` is the name of the module's class.

        Raises:
            ValueError: A share below 0 or from 1, or a negative weight.
        """
        Arguments(of).number(label_smoothing=self.label_smoothing, least=0, below=1)
        Arguments(of).number(z_loss=self.z_loss, least=0)

    def check(self, module: Any) -> None:
        """Refuse a module whose loss would not have the terms.

        Raises:
            ValueError: Says what keeps them from the loss, and what to change.
        """
        of, config = type(module).__name__, module.config
        if not self:
            return
        if not config.outputs_are_sharded:
            raise ValueError(
                f"{of}({self}) changes the loss over the vocabulary, and task={config.task!r} has none. Leave it out,"
                " or use a task that predicts tokens."
            )
        for name in WANT_LOGITS:
            if config.extra.get(name):
                raise ValueError(
                    f"{of}({self}) is computed without the logits of all tokens, and"
                    f" extra={{{name!r}: {config.extra[name]!r}}} wants them. Leave one of the two out."
                )
        if module.gives_logits_to_loss and module.has_own_loss:
            raise ValueError(
                f"{of}({self}) is part of {of}'s own loss only, and this class overrides `loss`, which is given logits."
                " Leave it out and compute it in `loss`, or do not override that method."
            )

    def check_built(self, module: Any) -> None:
        """Refuse a built model whose output layer gives no losses, which a ``build_model`` of the user's may make.

        Raises:
            ValueError: Says what is missing.
        """
        last = module.chunks[-1]
        layer = getattr(last, "output_layer", None)
        if self and last.post_process and not getattr(layer, "gives_losses", False):
            of = type(module).__name__
            raise ValueError(
                f"{of}({self}): the output layer of the model that {of}.build_model returned cannot compute it. Leave"
                " it out, or call OutputLayer.become on that layer, as the family's build_model does."
            )

    def __bool__(self) -> bool:
        return bool(self.label_smoothing or self.z_loss)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in asdict(self).items() if value)
