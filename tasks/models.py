"""
The reports' own models, as `PreTrainedModel` subclasses: a BiLSTM, a CNN, a ResNet-18 and a dense network.

With a config each, so that `save_pretrained`, `from_pretrained`, `push_to_hub` and Trainer's `model_init` work on them.
For two classes a classifier with `BCEWithLogitsLoss` has one logit, the log odds of class 1, of shape (batch, 1).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention, SequenceClassifierOutput


class BiLSTMConfig(PretrainedConfig):
    """
    Configuration of [`BiLSTMForSequenceClassification`].

    Args:
        vocab_size (`int`): Number of words, with the padding and unknown ones.
        embedding_size (`int`): Width of the word embedding.
        hidden_size (`int`): Width of the LSTM in each direction.
        pooling (`str`): `"max"` over the words, or `"last"`: each direction's last state.
        dropout (`float`): Before the dense layer.
        pad_token_id (`int`): The padding word.
    """

    model_type = "alrs_bilstm"

    def __init__(
        self,
        vocab_size: int = 20_000,
        embedding_size: int = 64,
        hidden_size: int = 64,
        pooling: str = "max",
        dropout: float = 0.5,
        pad_token_id: int = 0,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.pooling = pooling
        self.dropout = dropout
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class CNNConfig(PretrainedConfig):
    """
    Configuration of [`CNNForImageClassification`].

    Args:
        image_size (`int`): Height and width of the images.
        num_channels (`int`): Channels of the images.
        channels (`list[int]`): Output channels of each convolution; each is followed by a max-pooling that halves.
        dense_size (`int`): Width of the dense layer before the logits.
        dropout (`float`): Before the logits.
    """

    model_type = "alrs_cnn"

    def __init__(
        self,
        image_size: int = 32,
        num_channels: int = 3,
        channels: list[int] | tuple[int, ...] = (32, 64, 64),
        dense_size: int = 64,
        dropout: float = 0.0,
        **kwargs,
    ):
        self.image_size = image_size
        self.num_channels = num_channels
        self.channels = list(channels)
        self.dense_size = dense_size
        self.dropout = dropout
        super().__init__(**kwargs)


class SmallResNetConfig(PretrainedConfig):
    """
    Configuration of [`SmallResNetForImageClassification`].

    Args:
        num_channels (`int`): Channels of the images.
        layers (`list[int]`): Blocks in each of the four stages; (2, 2, 2, 2) is ResNet-18.
    """

    model_type = "alrs_small_resnet"

    def __init__(self, num_channels: int = 3, layers: list[int] | tuple[int, ...] = (2, 2, 2, 2), **kwargs):
        self.num_channels = num_channels
        self.layers = list(layers)
        super().__init__(**kwargs)


class TabularNetConfig(PretrainedConfig):
    """
    Configuration of [`TabularNetForClassification`].

    Args:
        num_features (`int`): Columns after the transform.
        hidden_sizes (`list[int]`): Widths of the dense layers.
        dropout (`float`): After each dense layer.
        batch_norm (`bool`): Whether each dense layer is followed by batch normalisation.
    """

    model_type = "alrs_tabular_net"

    def __init__(
        self,
        num_features: int = 1,
        hidden_sizes: list[int] | tuple[int, ...] = (64, 32),
        dropout: float = 0.3,
        batch_norm: bool = True,
        **kwargs,
    ):
        self.num_features = num_features
        self.hidden_sizes = list(hidden_sizes)
        self.dropout = dropout
        self.batch_norm = batch_norm
        super().__init__(**kwargs)


class SmallPreTrainedModel(PreTrainedModel):
    """Base of the models here. Weights start as PyTorch's own layers do, which suits shallow networks."""

    config_class = PretrainedConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Through transformers' own functions: they leave alone what `from_pretrained` has already loaded.
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LSTM):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)


class _SingleExampleBatchNorm:
    """
    Batch normalisation that takes its running statistics for a batch of one, whose own variance is not defined.

    The last batch of an epoch may hold a single example; PyTorch's layers stop the training there.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.training and hidden[:, 0].numel() == 1:
            return nn.functional.batch_norm(
                hidden, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(hidden)


class BatchNorm1d(_SingleExampleBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` that can be trained on a batch of one."""


class BatchNorm2d(_SingleExampleBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that can be trained on a batch of one 1x1 map."""


def binary_or_multiclass_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns `BCEWithLogitsLoss` for one logit, cross-entropy for more."""
    if logits.shape[-1] == 1:
        return nn.functional.binary_cross_entropy_with_logits(logits.squeeze(-1), labels.to(logits.dtype))
    return nn.functional.cross_entropy(logits, labels.long())


def num_logits(config: PretrainedConfig) -> int:
    """Returns how many logits a classifier with `BCEWithLogitsLoss` has: one for two classes."""
    return 1 if config.num_labels == 2 else config.num_labels


class BiLSTMForSequenceClassification(SmallPreTrainedModel):
    """
    Embedding, bidirectional LSTM, dropout and a dense layer; `BCEWithLogitsLoss` on one logit for two classes.

    Padding on the right is masked, so it changes nothing: the last state of a right-padded text would otherwise be what
    the LSTM remembers after hundreds of padding words, and nothing is learnt from it. The outcome is that of
    `pack_padded_sequence`, which this does without because PyTorch has no fast kernel for packed sequences on a CPU:
    a training step on 32 texts of up to 256 words takes a fifth of the time.
    """

    config_class = BiLSTMConfig
    main_input_name = "input_ids"

    def __init__(self, config: BiLSTMConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.forward_lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        self.backward_lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(2 * config.hidden_size, num_logits(config))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            # Keras' default range, which the report's model starts from; unit normals drown the words' differences.
            init.uniform_(module.weight, -0.05, 0.05)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids (`torch.Tensor` of shape (batch, words)): Padded on the right.
            attention_mask (`torch.Tensor`, *optional*): 1 for words, 0 for padding. Found from `pad_token_id` if absent.
            labels (`torch.Tensor` of shape (batch,), *optional*): Class indices.
        """
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        # A text without a single character has length 0: it is read as one padding word.
        if input_ids.shape[1] == 0:
            input_ids = input_ids.new_full((len(input_ids), 1), self.config.pad_token_id, dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
        lengths = attention_mask.sum(dim=1).clamp(min=1)[:, None]
        position = torch.arange(input_ids.shape[1], device=input_ids.device)[None, :]
        is_word = (position < lengths)[:, :, None]
        embedded = self.embedding(input_ids)
        # Each text is reversed within its own length, so that its padding stays behind it for both directions. A
        # state never depends on what is behind it, so no word's state depends on padding.
        reversal = torch.where(position < lengths, lengths - 1 - position, position)[:, :, None].expand_as(embedded)
        states = torch.cat(
            [self.forward_lstm(embedded)[0], self.backward_lstm(embedded.gather(1, reversal))[0]], dim=-1
        )
        if self.config.pooling == "max":
            pooled = states.masked_fill(~is_word, float("-inf")).amax(dim=1)
        else:
            pooled = states.gather(1, (lengths - 1)[:, :, None].expand(-1, 1, states.shape[-1])).squeeze(1)
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else binary_or_multiclass_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class CNNForImageClassification(SmallPreTrainedModel):
    """Convolution, ReLU and max-pooling, two or three times, then dense layers; cross-entropy."""

    config_class = CNNConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CNNConfig):
        super().__init__(config)
        layers: list[nn.Module] = []
        channels, size = config.num_channels, config.image_size
        for width in config.channels:
            layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, size // 2
        if size < 1:
            raise ValueError(f"{config.image_size} pixels cannot be halved {len(config.channels)} times.")
        self.features = nn.Sequential(*layers)
        self.dense = nn.Linear(channels * size * size, config.dense_size)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.dense_size, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutputWithNoAttention:
        """
        Args:
            pixel_values (`torch.Tensor` of shape (batch, channels, height, width)): Normalised images.
            labels (`torch.Tensor` of shape (batch,), *optional*): Class indices.
        """
        hidden = torch.relu(self.dense(self.features(pixel_values.to(self.dense.weight.dtype)).flatten(1)))
        logits = self.classifier(self.dropout(hidden))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


class SmallResNetForImageClassification(SmallPreTrainedModel):
    """
    torchvision's ResNet-18 for small images: a 3x3 stem of stride 1 and no max-pooling, cross-entropy.

    The usual 7x7 stem of stride 2 and its max-pooling leave an 8x8 map of a 32x32 image before the first block.
    """

    config_class = SmallResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SmallResNetConfig):
        super().__init__(config)
        from torchvision.models.resnet import BasicBlock, ResNet

        self.resnet = ResNet(BasicBlock, config.layers, num_classes=config.num_labels, norm_layer=BatchNorm2d)
        self.resnet.conv1 = nn.Conv2d(config.num_channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
        self.resnet.maxpool = nn.Identity()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            # As torchvision's ResNet does.
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            super()._init_weights(module)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutputWithNoAttention:
        """
        Args:
            pixel_values (`torch.Tensor` of shape (batch, channels, height, width)): Normalised images.
            labels (`torch.Tensor` of shape (batch,), *optional*): Class indices.
        """
        logits = self.resnet(pixel_values.to(self.resnet.fc.weight.dtype))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


class TabularNetForClassification(SmallPreTrainedModel):
    """Dense layers with batch normalisation, ReLU and dropout; `BCEWithLogitsLoss` on one logit for two classes."""

    config_class = TabularNetConfig
    main_input_name = "features"

    def __init__(self, config: TabularNetConfig):
        super().__init__(config)
        layers: list[nn.Module] = []
        width = config.num_features
        for size in config.hidden_sizes:
            layers.append(nn.Linear(width, size))
            if config.batch_norm:
                layers.append(BatchNorm1d(size))
            layers += [nn.ReLU(), nn.Dropout(config.dropout)]
            width = size
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, num_logits(config))
        self.post_init()

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> SequenceClassifierOutput:
        """
        Args:
            features (`torch.Tensor` of shape (batch, columns)): What the column transform returns.
            labels (`torch.Tensor` of shape (batch,), *optional*): Class indices.
        """
        logits = self.classifier(self.layers(features.to(self.classifier.weight.dtype)))
        loss = None if labels is None else binary_or_multiclass_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def register_models() -> None:
    """Makes the classes here known to `AutoConfig` and the auto models, once."""
    for config, model, auto in (
        (BiLSTMConfig, BiLSTMForSequenceClassification, AutoModelForSequenceClassification),
        (TabularNetConfig, TabularNetForClassification, AutoModelForSequenceClassification),
        (CNNConfig, CNNForImageClassification, AutoModelForImageClassification),
        (SmallResNetConfig, SmallResNetForImageClassification, AutoModelForImageClassification),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        auto.register(config, model, exist_ok=True)


register_models()
