"""
Fine-tune a text model with a learning rate that a network sets from live metrics: GLUE tasks and IMDB.

    python run_glue_alrs.py                                                         # built-in sample, no network needed
    accelerate launch run_glue_alrs.py --task_name sst2                              # Hub data and BERT base
    accelerate launch run_glue_alrs.py --task_name sst2 --dataset_name DATA_FOLDER --model_name_or_path MODEL_FOLDER \\
        --learning_rate 2e-5 --num_train_epochs 1 --output_dir outputs/sst2
    python run_glue_alrs.py --task_name imdb --scheduler linear                      # the same run under another scheduler
"""

from hf_alrs.cli import run_script
from tasks import TASKS


if __name__ == "__main__":
    run_script({name: task for name, task in TASKS.items() if task.kind == "text"}, default_task="sst2")
