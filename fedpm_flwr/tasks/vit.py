"""A small vision transformer, its attention made of plain Linear layers, whose curvature can be measured."""

import torch
from torch import Tensor, nn

PATCH = 4
"""Side of a patch, in pixels."""
_WIDTH = 64
_DEPTH = 4
_HEADS = 4
_HIDDEN = 2 * _WIDTH
_POSITION_DEVIATION = 0.02


class VisionTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) for images [batch, channels, height, width].

    Patches of 4 × 4 pixels become tokens of width 64 with a learned position; four blocks of four heads
    follow, with LayerNorm before each part. The mean over tokens is classified, so there is no class token.
    Height and width are multiples of 4.
    """

    def __init__(self, channels: int, height: int, width: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, _WIDTH, PATCH, stride=PATCH)
        self.positions = _Positions((height // PATCH) * (width // PATCH))
        self.blocks = nn.Sequential(*(_Block() for _ in range(_DEPTH)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.classifier = nn.Linear(_WIDTH, classes)

    def forward(self, images: Tensor) -> Tensor:
        """One number for each class, [batch, classes]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = self.norm(self.blocks(self.positions(tokens)))
        outputs: Tensor = self.classifier(tokens.mean(dim=1))
        return outputs


class _Positions(nn.Module):
    """Adds a learned vector to each token: without it their order would not matter."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, _WIDTH) * _POSITION_DEVIATION)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.weight


class _Block(nn.Module):
    """Attention, then two layers on each token, each on normalised tokens and added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(_WIDTH)
        self.attention = _Attention()
        self.mlp_norm = nn.LayerNorm(_WIDTH)
        self.mlp = nn.Sequential(nn.Linear(_WIDTH, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens))
        added: Tensor = tokens + self.mlp(self.mlp_norm(tokens))
        return added


class _Attention(nn.Module):
    """Self-attention; not nn.MultiheadAttention, which hides its weights from hooks on layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.output = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = self.query_key_value(tokens).unflatten(2, (3, _HEADS, _WIDTH // _HEADS))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [batch, heads, tokens, width of a head]
        # Written out: on the CPU torch's fused attention has no second derivative, which Newton and LTDA take.
        attended = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1) @ value
        mixed: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return mixed
