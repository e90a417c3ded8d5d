"""
Train an image classifier with a learning rate that a network sets from live metrics.

    python run_vision_alrs.py                                                       # built-in digits, no network needed
    accelerate launch run_vision_alrs.py --task_name cifar10                         # Hub data, the CNN of the first report
    accelerate launch run_vision_alrs.py --task_name cifar10 --model_type resnet18 --dataset_name DATA_FOLDER
"""

from hf_alrs.cli import run_script
from tasks import TASKS


if __name__ == "__main__":
    run_script({name: task for name, task in TASKS.items() if task.kind == "vision"}, default_task="cifar10")
