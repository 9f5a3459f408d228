"""Starts the ranks of a run: as copies of a script, or from a preloaded server; torchrun and SLURM start them too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_megatron.distributed import lightning_private
from lightning_megatron.strategy.launchers.rendezvous import meet
from lightning_megatron.strategy.launchers.script import ScriptLauncher
from lightning_megatron.strategy.launchers.slurm import environment_of
from lightning_megatron.strategy.launchers.timeouts import Timeouts

if TYPE_CHECKING:
    from lightning_megatron.strategy.launchers.returned_state import KeptCheckpoint

Launch = Literal["subprocess", "forkserver"]

__all__ = ["Launch", "Timeouts", "check", "choose", "environment_of", "kept_checkpoint", "meet"]


def check(launch: str | None) -> None:
    """Refuse an unknown value of ``MegatronStrategy(launch=)``.

    Raises:
        MisconfigurationException: ``launch`` is unknown.
    """
    if launch is not None and launch not in get_args(Launch):
        raise MisconfigurationException(
            f"MegatronStrategy(launch={launch!r}): use 'subprocess' (a script), 'forkserver' (a notebook), or leave it"
            " out, which chooses the one that fits."
        )


def choose(strategy: Any, launch: Launch | None) -> Any:
    """Choose the launcher of ``strategy``.

    Args:
        strategy: The strategy; its cluster environment and number of devices are set.
        launch: The user's choice. None is the forkserver in an interactive session, and otherwise the script.

    Returns:
        The launcher; None where the processes run already, and where one process is enough.

    Raises:
        MisconfigurationException: The user's choice does not work here.
    """
    environment = strategy.cluster_environment
    if environment.creates_processes_externally:
        if launch == "forkserver":
            raise MisconfigurationException(
                f"MegatronStrategy(launch='forkserver'): {type(environment).__name__} says that the processes of this"
                " run have been started already (by torchrun, SLURM, ...). Leave launch out."
            )
        return None
    if launch == "subprocess" and lightning_private.is_interactive():
        raise MisconfigurationException(
            "MegatronStrategy(launch='subprocess') runs the script again for each rank, and an interactive session or"
            " notebook has no script. Use launch='forkserver', or leave launch out."
        )
    if launch != "forkserver" and strategy.num_processes * strategy.num_nodes == 1:
        return None
    if launch == "forkserver" or (launch is None and lightning_private.is_interactive()):
        from lightning_megatron.strategy.launchers.forkserver import ForkserverLauncher  # a script never needs it

        return ForkserverLauncher(strategy)
    return ScriptLauncher(strategy)


def kept_checkpoint(strategy: Any) -> KeptCheckpoint | None:
    """The checkpoint that the ranks of the last ``fit`` left for the process that launched them; None in a rank.

    Raises:
        RuntimeError: There was no ``fit`` yet.
    """
    launcher = strategy.launcher
    if not hasattr(launcher, "kept"):
        return None
    if launcher.kept is None:
        raise RuntimeError(
            "MegatronStrategy(launch='forkserver'): there is nothing to save before trainer.fit; the model lives in the"
            " ranks, which have not trained yet."
        )
    kept: KeptCheckpoint = launcher.kept
    return kept
