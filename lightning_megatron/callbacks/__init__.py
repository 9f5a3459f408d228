"""Callbacks that show how a run is doing, and that end it. Each logs through ``self.log``, so every logger shows it.

Imports ``distributed``, ``training``, ``checkpoint``, ``models`` and ``strategy``.
"""

from lightning_megatron.callbacks.memory import MemoryMonitor
from lightning_megatron.callbacks.perplexity import Perplexity
from lightning_megatron.callbacks.phase_times import PhaseTimes
from lightning_megatron.callbacks.pipeline_timeline import PipelineTimeline
from lightning_megatron.callbacks.profile import Profile
from lightning_megatron.callbacks.progress_bars import RichTrainingProgressBar, TrainingProgressBar
from lightning_megatron.callbacks.run_end import ExitInterval, SaveAtEnd
from lightning_megatron.callbacks.throughput import Throughput
from lightning_megatron.callbacks.training_monitor import TrainingMonitor

__all__ = [
    "ExitInterval",
    "MemoryMonitor",
    "Perplexity",
    "PhaseTimes",
    "PipelineTimeline",
    "Profile",
    "RichTrainingProgressBar",
    "SaveAtEnd",
    "Throughput",
    "TrainingMonitor",
    "TrainingProgressBar",
]
