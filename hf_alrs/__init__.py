"""A small neural network sets the learning rate of a training run from live metrics."""

from .callback import ALRSCallback, ALRSTrainer
from .config import ALRSConfig, InputError
from .network import MetaLRNetwork
from .scheduler import ALRSScheduler, get_scheduler


__version__ = "0.1.0.dev0"

__all__ = [
    "ALRSCallback",
    "ALRSConfig",
    "ALRSScheduler",
    "ALRSTrainer",
    "InputError",
    "MetaLRNetwork",
    "get_scheduler",
]
