"""
Vision tasks: CIFAR-10 and any other labelled images, with a CNN, a ResNet-18 or a pretrained image classifier.

Images are decoded once and kept in memory as bytes (CIFAR-10's train split takes 150 MB); what is done for each batch,
augmentation and the image processor's rescaling and normalising, is one batched operation each. A source too large to
keep (`MAX_CACHED_BYTES`) is decoded batch by batch instead.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PILImage
from PIL import ImageOps
from torchvision.transforms import v2
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessor,
    default_data_collator,
)

from hf_alrs.experiment import DataArguments, InputError, PreparedTask

from .metrics import ClassificationMetrics
from .models import (
    CNNConfig,
    CNNForImageClassification,
    SmallResNetConfig,
    SmallResNetForImageClassification,
)
from .sources import (
    SAMPLE,
    Part,
    Source,
    check_arguments,
    check_choice,
    find_column,
    load_source,
    split_examples,
)
from .text import NO_CODE, label_options, load_pretrained


HUB_ID = "uoft-cs/cifar10"
LABEL_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MODEL_TYPES = ("cnn", "resnet18", "pretrained")
AUGMENTATIONS = ("standard", "report", "none")
IMAGE_COLUMNS = ("img", "image", "pixel_values", "picture", "photo")
# Larger images than this are shrunk to `DEFAULT_SIZE` for the built-in models, which are made for small ones.
MAX_SMALL_SIZE = 64
MIN_CNN_SIZE = 8
DEFAULT_SIZE = 32
MAX_CACHED_BYTES = 2 * 1024**3


# --- augmentation ------------------------------------------------------------------------------------------------


class BatchedHorizontalFlip(v2.Transform):
    """
    Mirrors each image of a batch with probability `p`, independently of the others.

    torchvision's own transforms draw one set of parameters for a whole batch. All draws here come from torch's global
    generator, so a seed decides them.

    Args:
        p (`float`): Probability.
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = p

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"flip": torch.rand(len(flat_inputs[0])) < self.p}

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        flip = params["flip"].to(inpt.device)
        return torch.where(flip[:, None, None, None], inpt.flip(-1), inpt)


class BatchedPadCrop(v2.Transform):
    """
    Pads with black and crops back to the same size at a random place, drawn for each image of a batch.

    Args:
        padding (`int`): Pixels on each side.
    """

    def __init__(self, padding: int = 4):
        super().__init__()
        self.padding = padding

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"offset": torch.randint(0, 2 * self.padding + 1, (2, len(flat_inputs[0])))}

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        batch, _, height, width = inpt.shape
        padded = nn_pad(inpt, self.padding)
        top, left = params["offset"].to(inpt.device)
        rows = (top[:, None] + torch.arange(height, device=inpt.device))[:, :, None]
        columns = (left[:, None] + torch.arange(width, device=inpt.device))[:, None, :]
        image = torch.arange(batch, device=inpt.device)[:, None, None]
        # Indexing puts the channels last; they go back in front.
        return padded.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2).contiguous()


def nn_pad(images: torch.Tensor, padding: int) -> torch.Tensor:
    """Pads the last two dimensions with zeros on every side."""
    return torch.nn.functional.pad(images, (padding,) * 4)


class BatchedRandomAffine(v2.Transform):
    """
    The random affine transform of Keras' `ImageDataGenerator`, drawn for each image of a batch.

    An output pixel at (row, column) from the centre is read at `R S Z (row, column) + R shift`, interpolated between
    pixels, with the nearest edge pixel outside the image (Keras' `fill_mode="nearest"`). Rotation, shear and zoom are
    drawn uniformly from both sides, zoom apart for rows and columns, as Keras does.

    Args:
        degrees (`float`): Rotation, in [-degrees, degrees].
        shift (`float`): Shift along each axis, as a share of the image's height or width.
        shear (`float`): Shear angle in degrees. Keras reads `shear_range=0.2` as 0.2 degrees, next to nothing; so it is
            here, to do what the report's code did and not what it may have meant.
        zoom (`float`): Zoom factors in [1 - zoom, 1 + zoom].
    """

    def __init__(self, degrees: float = 20.0, shift: float = 0.2, shear: float = 0.2, zoom: float = 0.2):
        super().__init__()
        self.degrees, self.shift, self.shear, self.zoom = degrees, shift, shear, zoom

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        batch, _, height, width = flat_inputs[0].shape
        angle, shear, shift_rows, shift_columns, zoom_rows, zoom_columns = 2 * torch.rand(6, batch) - 1
        angle, shear = torch.deg2rad(self.degrees * angle), torch.deg2rad(self.shear * shear)
        shift_rows, shift_columns = self.shift * height * shift_rows, self.shift * width * shift_columns
        zoom_rows, zoom_columns = 1 + self.zoom * zoom_rows, 1 + self.zoom * zoom_columns
        cos, sin = torch.cos(angle), torch.sin(angle)
        # R @ S @ Z for each image, in (row, column) coordinates, and R @ shift.
        a, b = cos * zoom_rows, (-cos * torch.sin(shear) - sin * torch.cos(shear)) * zoom_columns
        c, d = sin * zoom_rows, (-sin * torch.sin(shear) + cos * torch.cos(shear)) * zoom_columns
        row, column = cos * shift_rows - sin * shift_columns, sin * shift_rows + cos * shift_columns
        # affine_grid wants (x, y) coordinates that run from -1 to 1 over the image.
        theta = torch.stack(
            [d, c * height / width, 2 * column / width, b * width / height, a, 2 * row / height], dim=-1
        )
        return {"theta": theta.view(batch, 2, 3)}

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        images = inpt.to(torch.float32)
        grid = torch.nn.functional.affine_grid(params["theta"].to(images.device), images.shape, align_corners=False)
        return torch.nn.functional.grid_sample(
            images, grid, mode="bilinear", padding_mode="border", align_corners=False
        )


def build_augmentation(name: str, image_size: int = 32, flip: bool = True) -> v2.Transform | None:
    """
    Returns the batched augmentation of that name, for (batch, channels, height, width) images of 0 to 255.

    Args:
        name (`str`): `"standard"` (pad an eighth of the size, which is 4 of 32 pixels, crop and flip), `"report"`
            (rotation 20 degrees, shifts 0.2, shear 0.2, zoom 0.2, flip, nearest fill) or `"none"`.
        image_size (`int`): Decides the padding of `"standard"`.
        flip (`bool`): Whether to mirror; digits must not be.
    """
    check_choice("augmentation", name, AUGMENTATIONS)
    if name == "none":
        return None
    first = BatchedPadCrop(max(image_size // 8, 1)) if name == "standard" else BatchedRandomAffine()
    return v2.Compose([first, BatchedHorizontalFlip()] if flip else [first])


# --- decoding and feeding ----------------------------------------------------------------------------------------


class EncodedImages:
    """
    Images as files or bytes, decoded when asked for.

    Args:
        part (`Part`): The rows.
        column (`str`): The image column.
        size (`tuple[int, int]`): Height and width that every image is brought to.
        num_channels (`int`): 3 for colour, 1 for grey.
        crop (`bool`, *optional*, defaults to `False`): Whether images of another shape lose what is outside a central window of
            that shape, instead of being stretched.
    """

    def __init__(self, part: Part, column: str, size: tuple[int, int], num_channels: int, crop: bool = False):
        find_column(part.rows.column_names, column, (), "image_column")
        self.encoded = read_encoded(part, column)
        self.part, self.column, self.size, self.crop = part, column, size, crop
        self.mode = "L" if num_channels == 1 else "RGB"
        self.shape = (len(part), num_channels, *size)

    def __len__(self) -> int:
        return len(self.encoded)

    def decode(self, position: int) -> np.ndarray:
        """Returns one image as (height, width, channels) bytes, or raises `InputError` if it is corrupt."""
        try:
            image = eight_bit(ImageOps.exif_transpose(open_image(self.encoded[position]))).convert(self.mode)
        except Exception as error:
            raise InputError(
                "image_column",
                self.column,
                f"image {self.part.indices[position]} of the {self.part.split} split cannot be decoded "
                f"({type(error).__name__}: {str(error)[:100]}).",
                "Repair or remove that image.",
            ) from error
        height, width = self.size
        if image.size != (width, height):
            bring = ImageOps.fit if self.crop else PILImage.Image.resize
            image = bring(image, (width, height), PILImage.Resampling.BILINEAR)
        return np.asarray(image).reshape(height, width, -1)

    def __getitem__(self, positions: Sequence[int] | slice) -> torch.Tensor:
        if isinstance(positions, slice):
            positions = range(*positions.indices(len(self)))
        batch = np.stack([self.decode(int(position)) for position in positions])
        return torch.from_numpy(batch).permute(0, 3, 1, 2)

    def cached(self) -> torch.Tensor:
        """Decodes every image into one (n, channels, height, width) tensor of bytes."""
        count, channels, height, width = self.shape
        pixels = np.empty((count, height, width, channels), dtype=np.uint8)

        def fill(start: int) -> None:
            for position in range(start, min(start + 500, count)):
                pixels[position] = self.decode(position)

        # Decoders release the interpreter lock.
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            list(pool.map(fill, range(0, count, 500)))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def verify(self) -> None:
        """Decodes every image and keeps none, so that a corrupt one is found before training."""
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            for _ in pool.map(self.decode, range(len(self))):
                pass


def read_encoded(part: Part, column: str) -> list[Any]:
    """Returns the images of `part` undecoded, as the source stores them."""
    from datasets import Image

    rows = part.rows.with_format(None)
    if isinstance(rows.features[column], Image):
        rows = rows.cast_column(column, Image(decode=False))
    return rows[column][:]


def open_image(encoded: Any) -> PILImage.Image:
    """Opens an image given as bytes, as a path, or as datasets' `{"bytes": ..., "path": ...}`."""
    if isinstance(encoded, dict):
        encoded = encoded["bytes"] if encoded.get("bytes") is not None else encoded.get("path")
    if encoded is None:
        raise ValueError("the row holds no image")
    return PILImage.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)


def eight_bit(image: PILImage.Image) -> PILImage.Image:
    """Brings grey levels of 16 bits to 8, which Pillow's own conversion cuts off at 255."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if not image.mode.startswith("I"):
        return image
    return PILImage.fromarray(np.clip(np.rint(np.asarray(image) / 257.0), 0, 255).astype(np.uint8))


class ImageTransform:
    """
    What happens to a batch of bytes before the model: augmentation, then the Hugging Face image processor.

    Args:
        processor (`BaseImageProcessor`): Rescales and normalises, and resizes images of another size than its own.
        augmentation (`v2.Transform`, *optional*): Train only.
    """

    def __init__(self, processor: Any, augmentation: v2.Transform | None = None):
        self.processor = processor
        self.augmentation = augmentation
        crops = getattr(processor, "do_center_crop", None) or getattr(processor, "do_pad", None)
        self.is_pointwise = not crops and hasattr(processor, "rescale_and_normalize")

    def keeps_size(self, images: torch.Tensor) -> bool:
        """Whether the processor changes values alone, as it has nothing to resize."""
        if not self.is_pointwise or not getattr(self.processor, "do_resize", None):
            return self.is_pointwise
        size = dict(self.processor.size)
        return (size.get("height"), size.get("width")) == tuple(images.shape[-2:])

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self.augmentation is not None:
            images = self.augmentation(images)
        if self.keeps_size(images):
            # The whole batch at once; the processor's own call takes images apart and puts them together again.
            return self.processor.rescale_and_normalize(
                images,
                self.processor.do_rescale,
                self.processor.rescale_factor,
                self.processor.do_normalize,
                tuple(self.processor.image_mean),
                tuple(self.processor.image_std),
            )
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]


class ImageDataset(torch.utils.data.Dataset):
    """
    Images with labels, transformed a batch at a time; each item is `{"pixel_values": ..., "labels": ...}`.

    The transform belongs to the dataset, so one collator serves train (augmented) and evaluation (not augmented), and
    a loader with workers augments in them.

    Args:
        images (`torch.Tensor` or [`EncodedImages`]): Bytes of shape (n, channels, height, width).
        labels (`np.ndarray`, *optional*): Class indices.
        transform (`Callable`): From a batch of bytes to the model's `pixel_values`.
    """

    def __init__(
        self,
        images: torch.Tensor | EncodedImages,
        labels: np.ndarray | None,
        transform: Callable[[torch.Tensor], torch.Tensor],
    ):
        self.images = images
        self.labels = None if labels is None else torch.from_numpy(np.asarray(labels, dtype=np.int64))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        pixel_values = self.transform(self.images[indices])
        if self.labels is None:
            return [{"pixel_values": image} for image in pixel_values]
        labels = self.labels[indices]
        return [{"pixel_values": image, "labels": label} for image, label in zip(pixel_values, labels, strict=True)]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} images, and number {index} was asked for.")
        return self.__getitems__([index % len(self)])[0]


# --- the task ----------------------------------------------------------------------------------------------------


def digits_sample() -> Source:
    """Returns scikit-learn's bundled digits, 1,797 grey images of 8x8 pixels: real data, no network needed."""
    from datasets import ClassLabel, Features, Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # The pixels are counts of 0 to 16.
    grey = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rows = Dataset.from_dict(
        {"image": [PILImage.fromarray(image) for image in grey], "label": labels.tolist()},
        features=Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])}),
    )
    return Source(
        splits={"train": rows},
        description="built-in offline sample: scikit-learn's digits, 1,797 real images of 8x8 pixels (not CIFAR-10)",
    )


def prepare_vision(arguments: DataArguments) -> PreparedTask:
    """
    Loads CIFAR-10 or other labelled images, divides and decodes them, and says how to build the model.

    Raises:
        InputError: If anything given cannot work.
    """
    check_arguments(arguments)
    check_choice("augmentation", arguments.augmentation, AUGMENTATIONS)
    model_type = arguments.model_type or ("pretrained" if arguments.model_name_or_path else "cnn")
    check_choice("model_type", model_type, MODEL_TYPES)
    if (model_type == "pretrained") != (arguments.model_name_or_path is not None):
        raise InputError(
            "model_type",
            model_type,
            "`pretrained` goes with --model_name_or_path, and `cnn` and `resnet18` without.",
            "Give only one of the two, for example --model_name_or_path microsoft/resnet-18.",
        )
    name = arguments.model_name_or_path
    processor, pretrained_config = None, None
    if name is not None:
        pretrained_config = load_pretrained("config", name, lambda: AutoConfig.from_pretrained(name, **NO_CODE))
        processor = load_pretrained(
            "image processor", name, lambda: AutoImageProcessor.from_pretrained(name, **NO_CODE)
        )

    is_sample = arguments.dataset_name == SAMPLE
    source = load_source(arguments, HUB_ID, sample=digits_sample)
    train_rows = source.splits.get("train", next(iter(source.splits.values())))
    column = _image_column(arguments, train_rows)
    splits = split_examples(
        arguments,
        source,
        label_candidates=("label", "labels", "fine_label", "target", "class"),
        eval_names=("test", "validation", "valid", "val", "dev"),
        label_names=LABEL_NAMES if column == "img" and _is_cifar10(arguments, train_rows, column) else None,
    )
    if pretrained_config is not None:
        splits = splits.numbered_as(pretrained_config.id2label)
    num_channels = 1 if is_sample and processor is None else 3
    if processor is not None and getattr(pretrained_config, "num_channels", 3) == 1:
        num_channels = 1
        mean = getattr(processor, "image_mean", None)
        if getattr(processor, "do_normalize", False) and isinstance(mean, (list, tuple)) and len(mean) > 1:
            raise InputError(
                "model_name_or_path",
                name,
                f"the model reads one channel, and its image processor normalises {len(mean)}.",
                "Give its preprocessor_config.json an image_mean and an image_std of one number each.",
            )
    size = _decoded_size(train_rows, column, processor, pretrained_config)
    if model_type == "cnn" and min(size) < MIN_CNN_SIZE:
        raise InputError(
            "model_type",
            model_type,
            f"it halves images three times, and these have {size[1]}x{size[0]} pixels.",
            "Give resnet18, or images of 8x8 pixels or more.",
        )

    crop = _keeps_proportions(processor)
    parts = {"train": splits.train, "controller": splits.controller, "eval": splits.eval, "predict": splits.predict}
    pixels: dict[str, torch.Tensor | EncodedImages | None] = {}
    encoded = {
        key: None if part is None else EncodedImages(part, column, size, num_channels, crop)
        for key, part in parts.items()
    }
    num_bytes = sum(int(np.prod(images.shape)) for images in encoded.values() if images is not None)
    for key, images in encoded.items():
        if images is None:
            pixels[key] = None
        elif num_bytes <= MAX_CACHED_BYTES:
            pixels[key] = images.cached()
        else:
            images.verify()
            pixels[key] = images

    if processor is None:
        processor = image_processor(pixels["train"], size)
    plain = ImageTransform(processor)
    augmented = ImageTransform(processor, build_augmentation(arguments.augmentation, size[0], flip=not is_sample))

    def dataset(key: str, transform: ImageTransform) -> ImageDataset | None:
        return None if pixels[key] is None else ImageDataset(pixels[key], parts[key].labels, transform)

    return PreparedTask(
        train_dataset=dataset("train", augmented),
        controller_dataset=dataset("controller", plain),
        eval_dataset=dataset("eval", plain),
        predict_dataset=dataset("predict", plain),
        model_init=_model_init(model_type, arguments, pretrained_config, splits.label_names, size, num_channels),
        data_collator=default_data_collator,
        compute_metrics=ClassificationMetrics(len(splits.label_names), positive=splits.positive),
        processing_class=processor,
        label_names=splits.label_names,
        source=splits.description,
    )


def _is_cifar10(arguments: DataArguments, rows: Dataset, column: str) -> bool:
    """
    Whether labels are those of a copy of CIFAR-10, which may have lost the names of its classes: the names, of which a part of
    the data may lack some, or 0 to 9 of images of its size.
    """
    if arguments.label_column not in (None, "label") or "label" not in rows.column_names:
        return False
    labels = rows.unique("label")
    if all(isinstance(label, str) for label in labels):
        return len(labels) > 2 and {label.lower() for label in labels} <= set(LABEL_NAMES)
    return set(labels) == set(range(len(LABEL_NAMES))) and _sizes(rows, column) == {(32, 32)}


def _image_column(arguments: DataArguments, rows: Dataset) -> str:
    from datasets import Image

    # A column that is typed as images wins over one that is merely called so.
    typed = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    return find_column(rows.column_names, arguments.image_column, [*typed, *IMAGE_COLUMNS], "image_column")


def _sizes(rows: Dataset, column: str, count: int = 32) -> set[tuple[int, int]]:
    """The heights and widths of up to `count` images, spread evenly over `rows`; decoding names those that are none."""
    indices = np.unique(np.linspace(0, len(rows) - 1, count).astype(np.int64))
    sizes = set()
    for encoded in read_encoded(Part(rows.select(indices), None, indices, "train"), column):
        try:
            width, height = open_image(encoded).size
        except Exception:
            continue
        sizes.add((height, width))
    return sizes


def _decoded_size(rows: Dataset, column: str, processor: Any, pretrained_config: Any) -> tuple[int, int]:
    """Returns the height and width that every image is brought to: their own where they are small and all the same."""
    image_size = getattr(pretrained_config, "image_size", None)
    if image_size and not any(getattr(processor, name, None) for name in ("do_resize", "do_center_crop", "do_pad")):
        # What the processor leaves as it is must fit the model
        return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    sizes = _sizes(rows, column)
    height, width = sizes.pop() if len(sizes) == 1 else (0, 0)
    if 0 < max(height, width) <= MAX_SMALL_SIZE and (processor is not None or height == width):
        return (height, width)
    if processor is None:
        return (DEFAULT_SIZE, DEFAULT_SIZE)
    crop = None if _keeps_proportions(processor) else getattr(processor, "crop_size", None)
    size = dict(crop or processor.size)
    edge = size.get("shortest_edge") or size.get("height") or 224
    return (edge, size.get("width") or edge)


def _keeps_proportions(processor: Any) -> bool:
    """Whether a processor brings the shorter edge to a length and crops: what training sees of an image is to be the same."""
    edge = dict(getattr(processor, "size", None) or {}).get("shortest_edge")
    if edge is None or not getattr(processor, "do_resize", None):
        return False
    # ConvNeXT's stretches from 384 pixels on
    by_share = getattr(processor, "crop_pct", None) is not None and edge < 384
    return bool(getattr(processor, "do_center_crop", None)) or by_share


def image_processor(pixels: torch.Tensor | EncodedImages, size: tuple[int, int]) -> ViTImageProcessor:
    """
    Returns an image processor that rescales to 0..1 and normalises by the train split's own mean and deviation.

    Args:
        pixels (`torch.Tensor` or [`EncodedImages`]): The train split; up to 10,000 of its images are read.
        size (`tuple[int, int]`): Height and width of the images, to which the saved processor brings those of others; of a
            model with one channel it takes grey pictures alone.
    """
    some = pixels[: min(len(pixels), 10_000)].to(torch.float32) / 255
    mean = some.mean(dim=(0, 2, 3))
    std = some.std(dim=(0, 2, 3)).clamp(min=1e-3)
    return ViTImageProcessor(
        do_convert_rgb=len(mean) == 3,
        size={"height": size[0], "width": size[1]},
        image_mean=[round(value, 4) for value in mean.tolist()],
        image_std=[round(value, 4) for value in std.tolist()],
    )


def _model_init(
    model_type: str,
    arguments: DataArguments,
    pretrained_config: Any,
    label_names: Sequence[str],
    size: tuple[int, int],
    num_channels: int,
) -> Callable[[], PreTrainedModel]:
    options = label_options(label_names)

    def build_cnn() -> PreTrainedModel:
        config = CNNConfig(image_size=size[0], num_channels=num_channels, **options)
        return CNNForImageClassification(config)

    def build_resnet() -> PreTrainedModel:
        return SmallResNetForImageClassification(SmallResNetConfig(num_channels=num_channels, **options))

    def build_pretrained() -> PreTrainedModel:
        name = arguments.model_name_or_path
        # ImageNet's head of 1,000 classes is replaced; every other shape must match.
        has_other_head = pretrained_config.num_labels != len(label_names)
        # Of a checkpoint that was trained for something else it would be that one's
        options["problem_type"] = "single_label_classification"
        return load_pretrained(
            "model",
            name,
            lambda: AutoModelForImageClassification.from_pretrained(
                name, ignore_mismatched_sizes=has_other_head, **options, **NO_CODE
            ),
        )

    return {"cnn": build_cnn, "resnet18": build_resnet, "pretrained": build_pretrained}[model_type]
