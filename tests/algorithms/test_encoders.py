"""Encoders: what they are made of, and that no example's embedding depends on another's."""

import pytest
import torch
from torch import nn

from gossamer.algorithms.contrastive.encoders import MLP, Projected, ResNet18, ResNet50, ViT
from gossamer.algorithms.contrastive.text_encoders import Bag, PairModule, Transformer
from gossamer.algorithms.contrastive.views import ImageViews, PairViews
from gossamer.algorithms.tasks.models import seeded
from gossamer.runtime.component import validate
from gossamer.runtime.errors import ConfigError

pytest.importorskip("transformers", reason="needs the extra: gossamer[huggingface]")

SMALL = [MLP(), ResNet18(), ResNet18(norm="group"), ViT(patch=8, hidden=16, layers=2, heads=2)]
VIEWS = ImageViews("infinite", None, None, None)


def images(count=3, channels=3, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, size, size, generator=generator)


def built(encoder, *shape, seed=0):
    with seeded(seed):
        return encoder.build(*shape)


def shapes(module):
    return [tuple(p.shape) for p in module.parameters()]


def test_the_perceptron_is_64_128_128_32():
    module = built(MLP(), 1, 8, 8)
    assert shapes(module) == [(128, 64), (128,), (128, 128), (128,), (32, 128), (32,)]
    flat = images(2, 1, 8).flatten(1)
    first, second, last = (m for m in module.modules() if isinstance(m, nn.Linear))
    hidden = torch.relu(second(torch.relu(first(flat))))
    assert torch.equal(module.represent(images(2, 1, 8)), hidden)
    assert torch.equal(module(images(2, 1, 8)), last(hidden))


@pytest.mark.parametrize("norm", ["none", "group"])
@pytest.mark.parametrize(
    ("encoder", "layers", "width"), [(ResNet18, 20, 512), (ResNet50, 53, 2048)]
)
def test_no_batch_normalisation_stays_in_a_resnet(encoder, layers, width, norm):
    with torch.device("meta"):
        module = encoder(norm=norm).build(3, 32, 32)
    assert not [m for m in module.modules() if "BatchNorm" in type(m).__name__]
    assert not list(module.buffers())
    norms = [m for m in module.modules() if isinstance(m, nn.GroupNorm)]
    assert {m.num_groups for m in norms} == ({32} if norm == "group" else set())
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == layers
    assert len(norms) == (layers if norm == "group" else 0)
    assert module.represent(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, width)


def test_projectors_are_the_papers():
    with torch.device("meta"):
        small, large = ResNet18().build(3, 96, 96), ResNet50().build(3, 224, 224)
    assert shapes(small.projector) == [(512, 512), (512,)]
    assert shapes(small.backbone[1]) == [(512, 512), (512,)]
    assert shapes(large.projector) == [(2048, 2048), (2048,), (128, 2048), (128,)]


@pytest.mark.parametrize("encoder", SMALL, ids=lambda e: f"{e.name}-{getattr(e, 'norm', '')}")
def test_embeddings_are_unit_rows_each_of_its_image_alone(encoder):
    module = built(encoder, 3, 32, 32)
    rows = VIEWS.embed(module, (images(),), 0)
    assert rows.shape == (3, encoder.dim)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    alone = VIEWS.embed(module, (images()[1:2],), 0)
    torch.testing.assert_close(alone[0], rows[1], rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert VIEWS.embed(module, (images(),), 0).dtype == torch.float32
    assert VIEWS.embed(module.double(), (images().double(),), 0).dtype == torch.float64


@pytest.mark.parametrize("encoder", SMALL[1:], ids=lambda e: f"{e.name}-{getattr(e, 'norm', '')}")
def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator(encoder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = (built(encoder, 1, 32, 32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert not all(map(torch.equal, one.parameters(), other.parameters()))


def test_every_parameter_of_every_encoder_gets_a_gradient():
    for encoder in SMALL:
        module = built(encoder, 3, 32, 32)
        VIEWS.embed(module, (images(),), 0)[:, 0].sum().backward()
        assert all(p.grad is not None for p in module.parameters()), encoder.name


# --- captions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [Bag(width=8), Transformer(hidden=8, layers=2, heads=2)])
def test_a_captions_padding_is_not_seen(encoder):
    with seeded(0):
        module = encoder.build(50, 7, 5)
    tokens = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [9, 1, 2, -1, -1, -1, -1]])
    found = module(tokens)
    assert found.shape == (2, 5)
    torch.testing.assert_close(module(tokens[1:, :3])[0], found[1], rtol=0, atol=1e-6)
    assert module(torch.full((1, 7), -1)).isfinite().all()


def test_the_sides_of_a_pair_have_encoders_of_their_own():
    with seeded(0):
        module = PairModule(MLP(dim=5).build(1, 8, 8), Bag(width=8).build(50, 7, 5))
    views, tokens = PairViews(), torch.tensor([[1, 2, -1]] * 3)
    inputs = (images(3, 1, 8), tokens)
    for view, side in ((0, module.image), (1, module.text)):
        given = views.view(inputs, torch.arange(3), view, None, 0, 0)
        assert torch.equal(given[0], inputs[view])
        assert torch.equal(views.held(inputs, torch.arange(3), view)[0], inputs[view])
        rows = views.embed(module, given, view)
        torch.testing.assert_close(rows, nn.functional.normalize(side(*given)), rtol=0, atol=1e-6)
    assert isinstance(module.text, Projected)


# --- refusals ---------------------------------------------------------------------------------


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(ConfigError, match=r"task\.encoder\.patch: .* 30 and 32, got 16"):
        ViT().build(3, 30, 32)
    with pytest.raises(ConfigError, match=r"encoder\.heads: must divide hidden, 384, got 7"):
        validate(ViT, {"name": "vit", "heads": 7}, "encoder")
    with pytest.raises(ConfigError, match=r"text\.heads: must divide hidden, 512, got 3"):
        validate(Transformer, {"heads": 3}, "text")
