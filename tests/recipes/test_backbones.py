"""The backbones have their papers' shapes, and learn with all of their parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bench.encoder import Encoder
from mtlgrad.recipes import backbones
from mtlgrad.recipes.backbones import resnet18, resnet50


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_a_resnet_50_has_the_published_parameters() -> None:
    shapes = backbones.resnet50_shapes()
    assert len(shapes) == 161
    assert sum(math.prod(shape) for shape in shapes) == 25_557_032
    assert shapes[0] == (64, 3, 7, 7)
    assert shapes[-2:] == [(1000, 2048), (1000,)]
    assert backbones.resnet50_shapes(10)[-1] == (10,)


def test_resnets_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        assert count(resnet18()) == 11_689_512 - 513_000  # less its classifier
        assert count(resnet50()) == 25_557_032 - 2_049_000


NETWORKS = {
    "resnet-18": (lambda: resnet18(4), 32),
    "resnet-50": (lambda: resnet50(4), 128),
    "encoder": (lambda: Encoder(32, 2, 15), 32),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_features_have_their_width_and_reach_all_parameters(name: str) -> None:
    torch.manual_seed(0)
    make, width = NETWORKS[name]
    network, images = make(), torch.randn(3, 3, 40, 24)
    features = network(images)
    assert features.shape == (3, width)
    features.square().sum().backward()
    for parameter, p in network.named_parameters():
        assert p.grad is not None, parameter
        assert p.grad.isfinite().all(), parameter
        assert p.grad.abs().max() > 0, parameter
    network.eval()
    alone, together = network(images[:1]), network(images)[:1]
    assert torch.allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_pass_repeats_itself_in_training(name: str) -> None:
    """The benchmarks compare passes: nothing is random in them."""
    network, images = NETWORKS[name][0](), torch.randn(3, 3, 40, 24)
    assert torch.equal(network(images), network(images))


@pytest.mark.parametrize(("make", "width"), [(resnet18, 4 * 8), (resnet50, 4 * 32)])
def test_a_resnet_ends_in_a_32th_of_the_image(make, width: int) -> None:
    network = make(4)
    sizes: list[tuple[int, ...]] = []
    for module in network:
        module.register_forward_hook(lambda _, inputs, output: sizes.append(tuple(output.shape[2:])))
    assert network(torch.randn(2, 3, 64, 96)).shape == (2, width)
    assert list(dict.fromkeys(sizes)) == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3), (1, 1), ()]


def test_the_stride_of_a_bottleneck_is_that_of_its_3_x_3_convolution() -> None:
    strided = [m for m in resnet50(4).modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert [m.kernel_size[0] for m in strided] == [7, *[3, 1] * 3]


def test_a_block_passes_its_input_around() -> None:
    torch.manual_seed(0)
    network, images = resnet18(4), torch.randn(2, 4, 8, 8)
    block = network[4]
    assert isinstance(block.around, nn.Identity)
    nn.init.zeros_(block.path[-1].weight)
    assert torch.equal(block(images), images.relu())


def test_convolutions_keep_the_size_of_gradients() -> None:
    """He et al.: the weights' variance is two over the fan out."""
    torch.manual_seed(0)
    weight = resnet18(32)[-4].path[0].weight
    assert float(weight.detach().std()) == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.02)


def test_an_encoder_knows_its_patches_by_their_positions_alone() -> None:
    torch.manual_seed(0)
    network, images = Encoder(32, 2, 4).eval(), torch.randn(2, 3, 16, 16)
    swapped = torch.cat([images[..., 8:], images[..., :8]], -1)
    assert (network(images) - network(swapped)).abs().max() > 1e-4
    nn.init.zeros_(network.positions)
    assert torch.allclose(network(images), network(swapped), atol=1e-5)


def test_an_encoder_normalises_before_each_part() -> None:
    """Parts that add nothing leave the tokens as they are, whatever their own normalisations do."""
    torch.manual_seed(0)
    network, images = Encoder(32, 3, 4), torch.randn(2, 3, 16, 16)
    for layer in network.layers.layers:
        for last in layer.self_attn.out_proj, layer.linear2:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        for norm in layer.norm1, layer.norm2:
            nn.init.normal_(norm.bias)
    tokens = network.patches(images).flatten(2).mT + network.positions
    assert torch.allclose(network(images), network.layers.norm(tokens).mean(1), atol=1e-6)


def test_an_encoder_names_the_number_of_patches_it_was_made_for() -> None:
    with pytest.raises(ValueError, match=r"expected 4 patches, found 6 in images \[1, 3, 16, 24\]; tokens= is"):
        Encoder(32, 1, 4)(torch.randn(1, 3, 16, 24))
