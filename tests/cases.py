"""Seeded float64 models and an operation of one's own: a CNN, a small ViT, image-to-image, tokens, channels last."""

import torch
from torch import nn
from torch.nn import functional as F


class OldSquare(torch.autograd.Function):
    """No torch function: an operation that declares its derivative, in reverse mode alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class ImageToImage(nn.Module):
    """Strided convolutions down and bilinear up: an image-valued output of another size than the input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.out = nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x):
        y = F.silu(self.norm(self.down(x)))
        return self.out(F.interpolate(y, scale_factor=1.5, mode="bilinear"))


class TokensOut(nn.Module):
    """Patch tokens behind one learned token, with the grid declared as timm's transformers do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.patch_embed.grid_size = (4, 4)
        self.num_prefix_tokens = 1
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 17, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")

    def forward(self, x):
        y = self.patch_embed(x).flatten(2).mT
        return self.block(torch.cat([self.token.expand(len(x), -1, -1), y], 1) + self.position)


def cnn(classes=5):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.GELU(), nn.Dropout(0.3), nn.Conv2d(6, 8, 3), nn.Tanh()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)).double()
    model[1].running_mean.uniform_(-0.5, 0.5)
    model[1].running_var.uniform_(0.5, 2)
    return model


def channels_last():
    torch.manual_seed(3)
    conv = nn.Conv2d(3, 4, 3, 2, 1).double()
    return lambda x: F.gelu(conv(x).permute(0, 2, 3, 1))


def vit():
    import timm

    torch.manual_seed(4)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )
    return model.double()


def images(n=3, size=16, seed=5):
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
