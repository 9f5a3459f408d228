"""Which of ``Trainer(plugins=)`` the strategy can take. Precision is converted in ``precision.py``."""

from __future__ import annotations

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_checkpoint_io(given: CheckpointIO | None) -> None:
    """Refuse a checkpoint IO: it would be handed one rank's shard as if it were the checkpoint.

    Args:
        given: The user's; None without one.

    Raises:
        MisconfigurationException: There is one.
    """
    if given is not None:
        raise MisconfigurationException(
            f"MegatronStrategy writes its checkpoints itself, each rank its shard into one directory;"
            f" plugins=[{type(given).__name__}()] would see a shard for the whole. Leave it out."
        )
