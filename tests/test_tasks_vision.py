"""The vision tasks: batched augmentation, models, decoding, and the digits sample."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_alrs.experiment import DataArguments, InputError
from tasks import TASKS
from tasks.models import (
    CNNConfig,
    CNNForImageClassification,
    SmallResNetConfig,
    SmallResNetForImageClassification,
)
from tasks.vision import (
    BatchedHorizontalFlip,
    BatchedPadCrop,
    BatchedRandomAffine,
    EncodedImages,
    ImageDataset,
    ImageTransform,
    build_augmentation,
    image_processor,
)


DATA = Path(__file__).parents[1].parent / "shared" / "data" / "cifar10"


def prepare(**options):
    return TASKS["cifar10"].prepare(DataArguments(task_name="cifar10", **options))


def write_image_folder(folder, per_class=10, size=(12, 12), splits=("train", "test")):
    generator = np.random.default_rng(0)
    for split in splits:
        for number, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for index in range(per_class):
                pixels = generator.integers(0, 100, (*size, 3), dtype=np.uint8) + np.uint8(100 * number)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


# --- augmentation ---


def scipy_affine(image, theta):
    """Keras' own arithmetic: scipy's affine transform about the centre, bilinear, nearest fill."""
    from scipy.ndimage import affine_transform

    height, width = image.shape
    d, c, x, b, a, y = theta.flatten().tolist()
    matrix = np.array([[a, b * height / width], [c * width / height, d]])
    shift = np.array([y * height / 2, x * width / 2])
    centre = (np.array([height, width]) - 1) / 2
    return affine_transform(image, matrix, offset=centre - matrix @ centre + shift, order=1, mode="nearest")


@pytest.mark.parametrize("size", [(16, 16), (10, 18)])
def test_affine_equals_keras_arithmetic_with_nearest_fill(size):
    torch.manual_seed(0)
    images = torch.rand(6, 1, *size) * 255
    augment = BatchedRandomAffine()
    params = augment.make_params([images])
    result = augment.transform(images, params)
    for image, transformed, theta in zip(images, result, params["theta"], strict=True):
        expected = scipy_affine(image[0].numpy(), theta)
        np.testing.assert_allclose(transformed[0].numpy(), expected, atol=2e-3)


def test_affine_draws_within_the_ranges_of_the_report():
    torch.manual_seed(0)
    theta = BatchedRandomAffine().make_params([torch.zeros(4000, 3, 32, 32)])["theta"]
    determinant = theta[:, 0, 0] * theta[:, 1, 1] - theta[:, 0, 1] * theta[:, 1, 0]
    assert 0.63 < determinant.min() < 0.70 and 1.36 < determinant.max() < 1.45
    angle = torch.rad2deg(torch.atan2(theta[:, 0, 1], theta[:, 1, 1])).abs().max()
    assert 19 < angle < 21
    # A shift of 0.2 of the size is 0.4 of the coordinates from -1 to 1; both axes rotate into each other.
    assert 0.45 < theta[:, :, 2].abs().max() < 0.4 * 2**0.5


def test_identity_affine_changes_nothing():
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    result = BatchedRandomAffine(0, 0, 0, 0)(images)
    torch.testing.assert_close(result, images.float(), atol=1e-3, rtol=0)


def test_pad_crop_is_a_window_of_the_padded_image():
    torch.manual_seed(0)
    images = torch.randint(1, 256, (64, 3, 8, 8), dtype=torch.uint8)
    augment = BatchedPadCrop(2)
    params = augment.make_params([images])
    result = augment.transform(images, params)
    padded = torch.nn.functional.pad(images, (2,) * 4)
    for number, (top, left) in enumerate(params["offset"].T.tolist()):
        assert torch.equal(result[number], padded[number, :, top : top + 8, left : left + 8])
    assert len(set(map(tuple, params["offset"].T.tolist()))) > 10


def test_flip_mirrors_about_half_of_a_batch():
    torch.manual_seed(0)
    images = torch.rand(200, 1, 4, 4)
    result = BatchedHorizontalFlip()(images)
    flipped = (result == images.flip(-1)).flatten(1).all(1)
    kept = (result == images).flatten(1).all(1)
    assert (flipped | kept).all() and 70 < flipped.sum() < 130


@pytest.mark.parametrize("name", ["standard", "report"])
def test_augmentation_follows_the_global_seed(name):
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    augment = build_augmentation(name, 16)
    torch.manual_seed(1)
    first = augment(images)
    torch.manual_seed(1)
    assert torch.equal(augment(images), first)
    assert not torch.equal(augment(images), first)
    assert build_augmentation("none") is None


# --- models ---


@pytest.mark.parametrize(
    "model",
    [
        lambda: CNNForImageClassification(CNNConfig(image_size=16, channels=(4, 8), num_labels=3)),
        lambda: SmallResNetForImageClassification(SmallResNetConfig(num_labels=3)),
    ],
    ids=["cnn", "resnet18"],
)
def test_image_models_save_and_load(model, tmp_path):
    torch.manual_seed(0)
    model = model()
    images = torch.rand(4, 3, 16, 16)
    output = model.train()(pixel_values=images, labels=torch.tensor([0, 1, 2, 0]))
    assert output.loss.item() > 0 and output.logits.shape == (4, 3)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    # The running statistics of batch normalisation, which training changed, are among what is kept.
    torch.testing.assert_close(again(pixel_values=images).logits, model(pixel_values=images).logits)
    assert model(pixel_values=images).loss is None


def test_resnet18_is_torchvisions_but_for_the_stem():
    from torchvision.models import resnet18
    from torchvision.models.resnet import BasicBlock

    model = SmallResNetForImageClassification(SmallResNetConfig(num_labels=10))
    assert model.resnet.conv1.kernel_size == (3, 3) and model.resnet.conv1.stride == (1, 1)
    assert isinstance(model.resnet.layer1[0], BasicBlock) and isinstance(model.resnet.maxpool, torch.nn.Identity)
    ours = {name: value.shape for name, value in model.resnet.state_dict().items() if name != "conv1.weight"}
    theirs = {name: value.shape for name, value in resnet18(num_classes=10).state_dict().items()}
    theirs.pop("conv1.weight")
    assert ours == theirs
    # A last batch of one 8x8 image leaves 1x1 maps, whose own variance is not defined.
    assert model.train()(pixel_values=torch.rand(1, 3, 8, 8)).logits.isfinite().all()


# --- datasets ---


def test_only_train_is_augmented(tmp_path):
    folder = write_image_folder(tmp_path / "images", per_class=20)
    task = prepare(dataset_name=str(folder), augmentation="standard", controller_split=0.2)
    assert task.label_names == ["cat", "dog"]
    assert (len(task.train_dataset), len(task.controller_dataset), len(task.eval_dataset)) == (32, 8, 40)
    for dataset in (task.controller_dataset, task.eval_dataset):
        assert dataset.transform.augmentation is None
        assert torch.equal(dataset[3]["pixel_values"], dataset[3]["pixel_values"])
    items = [task.train_dataset[0]["pixel_values"] for _ in range(8)]
    assert any(not torch.equal(items[0], item) for item in items[1:])
    batch = task.data_collator(task.train_dataset.__getitems__([0, 5, 7]))
    assert batch["pixel_values"].shape == (3, 3, 12, 12) and batch["labels"].shape == (3,)
    with pytest.raises(IndexError):
        task.train_dataset[32]


def test_pixels_are_normalised_by_train_and_the_processor_is_saved(tmp_path):
    folder = write_image_folder(tmp_path / "images", per_class=20)
    task = prepare(dataset_name=str(folder), augmentation="none")
    pixels = torch.stack([task.train_dataset[number]["pixel_values"] for number in range(len(task.train_dataset))])
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=2e-3, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.ones(3), atol=2e-3, rtol=0)
    task.processing_class.save_pretrained(tmp_path / "processor")
    again = AutoImageProcessor.from_pretrained(tmp_path / "processor")
    raw = Image.open(folder / "test" / "cat" / "0.png")
    reference = again(images=raw, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(task.eval_dataset[0]["pixel_values"], reference)


def test_decoding_in_batches_equals_the_cache(tmp_path, monkeypatch):
    folder = write_image_folder(tmp_path / "images")
    cached = prepare(dataset_name=str(folder), augmentation="none")
    monkeypatch.setattr("tasks.vision.MAX_CACHED_BYTES", 0)
    lazy = prepare(dataset_name=str(folder), augmentation="none")
    assert isinstance(lazy.train_dataset.images, EncodedImages)
    for left, right in zip(
        cached.eval_dataset.__getitems__([0, 3]), lazy.eval_dataset.__getitems__([0, 3]), strict=True
    ):
        assert torch.equal(left["pixel_values"], right["pixel_values"])


def test_large_images_are_shrunk_for_the_small_models(tmp_path):
    folder = write_image_folder(tmp_path / "images", per_class=10, size=(80, 100))
    assert prepare(dataset_name=str(folder)).eval_dataset[0]["pixel_values"].shape == (3, 32, 32)


@pytest.mark.parametrize("sizes", [[(12, 12), (40, 40)], [(12, 12)] * 9 + [(300, 200)]])
def test_no_single_image_decides_the_size_of_all(sizes, tmp_path):
    for number in range(40):
        folder = tmp_path / "images" / ("cat", "dog")[number // 20]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", sizes[number % len(sizes)]).save(folder / f"{number:02}.png")
    for seed in range(3):
        task = prepare(dataset_name=str(tmp_path / "images"), split_seed=seed)
        assert task.train_dataset.images.shape[1:] == (3, 32, 32)


def test_parquet_with_bytes_and_bare_labels(tmp_path):
    import pandas as pd

    def png(value, size=32):
        buffer = io.BytesIO()
        Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    frame = pd.DataFrame(
        {"img": [png(number) for number in range(40)], "label": [number % 10 for number in range(40)]}
    )
    (tmp_path / "data").mkdir()
    frame.to_parquet(tmp_path / "data" / "train.parquet")
    frame.to_parquet(tmp_path / "data" / "test.parquet")
    task = prepare(dataset_name=str(tmp_path / "data"), controller_split=0.25)
    assert task.label_names[3] == "cat" and len(task.controller_dataset) == 10
    # Other classes in columns of the same names, or of CIFAR-100's; digits, as MNIST has; and cats and dogs
    cases = (
        (frame.assign(label=frame.label % 3), ["0", "1", "2"]),
        (frame.rename(columns={"label": "fine_label"}), [str(label) for label in range(10)]),
        (frame.assign(img=[png(number, 28) for number in range(40)]), [str(label) for label in range(10)]),
        (frame.assign(label=["dog", "cat"] * 20), ["cat", "dog"]),
        (frame.assign(label=["Dog", "cat", "horse", "ship"] * 10), task.label_names),
    )
    for number, (others, names) in enumerate(cases):
        own = tmp_path / f"own-{number}"
        own.mkdir()
        others.to_parquet(own / "train.parquet")
        others.to_parquet(own / "test.parquet")
        assert prepare(dataset_name=str(own), controller_split=0.25).label_names == names


def test_a_pretrained_classifier_resizes_and_gets_a_new_head(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=7)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "model")
    folder = write_image_folder(tmp_path / "images", per_class=10)
    task = prepare(dataset_name=str(folder), model_name_or_path=str(tmp_path / "model"))
    batch = task.data_collator(task.train_dataset.__getitems__([0, 1]))
    assert batch["pixel_values"].shape == (2, 3, 24, 24)
    assert task.model_init()(**batch).logits.shape == (2, 2)


def save_vit(folder, num_channels=3, **options):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, num_channels=num_channels)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}, **options).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("num_channels", "options"),
    [(3, {"do_resize": False}), (1, {"image_mean": [0.5], "image_std": [0.5]}), (1, {"do_normalize": False})],
)
def test_images_are_brought_to_what_a_pretrained_model_reads(num_channels, options, tmp_path):
    model = save_vit(tmp_path / "model", num_channels, **options)
    folder = write_image_folder(tmp_path / "images", size=(12, 20))
    task = prepare(dataset_name=str(folder), model_name_or_path=model)
    batch = task.data_collator(task.train_dataset.__getitems__([0, 1]))
    assert batch["pixel_values"].shape == (2, num_channels, 16, 16)
    assert task.model_init()(**batch).logits.shape == (2, 2)


@pytest.mark.parametrize("kind", ["crop size", "crop share", "stretch"])
def test_training_sees_of_a_long_image_what_the_processor_leaves(kind, tmp_path):
    from PIL import Image
    from transformers import AutoImageProcessor, BitImageProcessor, ConvNextImageProcessor, ViTImageProcessor

    model = save_vit(tmp_path / "model")
    processor = {
        "crop size": lambda: BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
        "crop share": lambda: ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=0.8),
        "stretch": lambda: ViTImageProcessor(size={"height": 16, "width": 16}),
    }[kind]()
    processor.save_pretrained(model)
    # From left to right every image gets brighter, by as much in each
    ramp = np.broadcast_to(np.linspace(0, 255, 200)[:, None], (80, 200, 3)).astype(np.uint8)
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(10):
            Image.fromarray(ramp).save(tmp_path / "images" / label / f"{index}.png")
    task = prepare(dataset_name=str(tmp_path / "images"), model_name_or_path=model)
    seen = task.eval_dataset[0]["pixel_values"]
    wanted = AutoImageProcessor.from_pretrained(model)(Image.fromarray(ramp), return_tensors="pt")["pixel_values"][0]
    assert seen.shape == wanted.shape == (3, 16, 16)
    assert (seen - wanted).abs().max() < 0.08, "of a range of 4"


def test_a_processor_of_other_channels_than_the_model(tmp_path):
    folder = write_image_folder(tmp_path / "images")
    with pytest.raises(InputError, match="reads one channel, and its image processor normalises 3"):
        prepare(dataset_name=str(folder), model_name_or_path=save_vit(tmp_path / "model", num_channels=1))


def test_trainer_runs_on_the_digits_sample(tmp_path):
    task = prepare(dataset_name="sample", augmentation="none")
    assert "built-in offline sample" in task.source and task.label_names == [str(digit) for digit in range(10)]
    assert len(task.train_dataset) + len(task.controller_dataset) + len(task.eval_dataset) == 1797
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=120,
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        seed=0,
    )
    run = Trainer(
        model_init=task.model_init,
        args=arguments,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
        data_collator=task.data_collator,
        compute_metrics=task.compute_metrics,
        processing_class=task.processing_class,
    )
    run.train()
    assert run.evaluate()["eval_accuracy"] > 0.85


def test_the_saved_processor_takes_pictures_of_any_size(tmp_path):
    from PIL import Image
    from transformers import AutoImageProcessor

    task = prepare(dataset_name=str(write_image_folder(tmp_path / "images", size=(16, 16))))
    task.processing_class.save_pretrained(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 4), dtype=np.uint8), "RGBA")
    batch = processor(picture, return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert task.model_init()(**batch).logits.shape == (1, 2)
    # Of its own size, it gives what the run evaluates
    same = task.eval_dataset.images[:2]
    expected = torch.stack([task.eval_dataset[i]["pixel_values"] for i in (0, 1)])
    assert torch.allclose(processor(list(same), return_tensors="pt")["pixel_values"], expected, atol=1e-6)


def test_digits_are_not_mirrored():
    task = prepare(dataset_name="sample", augmentation="standard", model_type="resnet18")
    kinds = {type(step) for step in task.train_dataset.transform.augmentation.transforms}
    assert kinds == {BatchedPadCrop}
    assert task.model_init().config.num_channels == 1


@pytest.mark.parametrize("augmentation", ["none", "standard", "report"])
def test_feeding_costs_little_of_a_training_step(augmentation):
    # By processor time, which other work on the machine does not stretch: fetching, augmenting, normalising and
    # collating a batch, beside a step of the smallest model on a batch that is already there.
    import time

    from transformers import default_data_collator

    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2000, 3, 32, 32), dtype=torch.uint8)
    processor = image_processor(pixels, (32, 32))
    dataset = ImageDataset(pixels, np.zeros(2000), ImageTransform(processor, build_augmentation(augmentation, 32)))
    model = CNNForImageClassification(CNNConfig(num_labels=10))
    optimizer = torch.optim.Adam(model.parameters())

    def fetch():
        return default_data_collator(dataset.__getitems__(torch.randint(0, 2000, (32,)).tolist()))

    batch = fetch()

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def seconds(function, repeats=15):
        function()
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            for _ in range(repeats):
                function()
            best = min(best, time.process_time() - start)
        return best

    assert seconds(fetch) < 0.15 * seconds(step)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real datasets are not here")
def test_cifar10_decodes_and_divides():
    task = prepare(dataset_name=str(DATA), max_train_samples=300, max_eval_samples=100)
    assert (len(task.train_dataset), len(task.controller_dataset), len(task.eval_dataset)) == (270, 30, 100)
    assert task.label_names[0] == "airplane" and task.train_dataset.images.dtype == torch.uint8
    assert torch.bincount(task.eval_dataset.labels).tolist() == [10] * 10
