#!/usr/bin/env python
"""
Fine-tuning a sequence classifier, in the shape of transformers' `run_glue.py`. What ALRS adds is marked `# ALRS`.

The data and the model are made up on the spot, so that the script runs anywhere within seconds.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_alrs import ALRSCallback, ALRSConfig  # ALRS


logger = logging.getLogger(__name__)


@dataclass
class DataTrainingArguments:
    """What the model is trained on."""

    max_seq_length: int = field(default=12, metadata={"help": "Tokens of a sequence."})
    max_train_samples: int = field(default=128, metadata={"help": "Training examples."})
    max_eval_samples: int = field(default=32, metadata={"help": "Evaluation examples."})


@dataclass
class ModelArguments:
    """Which model is trained, and which network drives its learning rate."""

    vocab_size: int = field(default=40, metadata={"help": "Size of the vocabulary."})
    alrs_network: str = field(default="default", metadata={"help": "As `ALRSConfig.network`."})  # ALRS


def make_dataset(num_examples: int, length: int, vocab_size: int, seed: int) -> datasets.Dataset:
    """Sequences whose label tells whether more tokens come from the upper half of the vocabulary."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, size=(num_examples, length))
    labels = ((tokens >= vocab_size // 2).sum(1) > length // 2).astype(int)
    return datasets.Dataset.from_dict(
        {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "label": labels.tolist()}
    )


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)])
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    torch.set_num_threads(1)

    last_checkpoint = None
    if os.path.isdir(training_args.output_dir) and training_args.do_train:
        last_checkpoint = get_last_checkpoint(training_args.output_dir)
    if last_checkpoint is not None:
        logger.warning("Checkpoint detected, resuming training at %s.", last_checkpoint)

    set_seed(training_args.seed)

    length, vocab_size = data_args.max_seq_length, model_args.vocab_size
    train_dataset = make_dataset(data_args.max_train_samples, length, vocab_size, seed=1)
    eval_dataset = make_dataset(data_args.max_eval_samples, length, vocab_size, seed=2)

    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=length,
        num_labels=2,
    )
    model = AutoModelForSequenceClassification.from_config(config)

    def compute_metrics(p: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        data_collator=default_data_collator,
        callbacks=[ALRSCallback(ALRSConfig(network=model_args.alrs_network))],  # ALRS
    )

    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint or last_checkpoint
        train_result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", train_result.metrics)
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate(eval_dataset=eval_dataset)
        metrics["eval_samples"] = len(eval_dataset)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
