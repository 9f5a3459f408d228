"""What a configuration says of a head with labels: how many there are, and which loss they have."""

from __future__ import annotations

from typing import Any, Literal, get_args

from lightning_megatron.distributed.arguments import Arguments

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

# peft's names of the tasks.
PEFT_TASKS = {
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
}


def check(config: Any) -> None:
    """Refuse settings of a head that do not exist or do not go together.

    Args:
        config: A configuration with ``task``, ``num_labels`` and ``problem_type``.

    Raises:
        ValueError: A value is wrong; the message has it.
    """
    of = type(config).__name__
    Arguments(of).whole(num_labels=config.num_labels)
    if config.task == "question_answering" and config.num_labels != 2:
        raise ValueError(
            f"{of}(task='question_answering', num_labels={config.num_labels}): each token has two numbers, how well the"
            " answer begins and how well it ends there. Use num_labels=2."
        )
    if config.problem_type is None:
        return
    config._one_of("problem_type", config.problem_type, get_args(ProblemType))
    if config.task != "sequence_classification":
        raise ValueError(
            f"{of}(task={config.task!r}, problem_type={config.problem_type!r}): only task='sequence_classification' has"
            " problem types. Leave problem_type out."
        )
    if config.problem_type == "single_label_classification" and config.num_labels == 1:
        raise ValueError(
            f"{of}(problem_type='single_label_classification', num_labels=1): one class teaches nothing. Use"
            " num_labels=2, or problem_type='regression'."
        )


def problem(config: Any, labels_are_floating: bool) -> ProblemType:
    """The loss of sequence classification, by transformers' rule where ``problem_type`` is None."""
    if config.problem_type is not None:
        chosen: ProblemType = config.problem_type
        return chosen
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels_are_floating else "single_label_classification"
