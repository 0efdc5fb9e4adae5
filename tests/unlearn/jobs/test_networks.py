"""Networks that jobs share: any size of image, losses of samples apart, rows exact and fast."""

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.digits.data import DigitsCNN
from gradsurgery.unlearn.jobs.networks import SmallCNN, SmallViT, resnet18
from gradsurgery.unlearn.objectives.classification import cross_entropy

MAKERS = (SmallCNN, resnet18, SmallViT)
SIZES = [(1, (28, 28)), (3, (33, 17)), (3, (64, 64)), (1, (1, 1))]
CASES = [(f, *s) for f in MAKERS for s in SIZES if (f, s) != (SmallCNN, SIZES[-1])]


def names(value):
    return value.__name__ if callable(value) else str(value).replace(" ", "")


def blank(channels, size, samples=3):
    return torch.rand(samples, channels, *size), torch.arange(samples)


class Written(nn.Module):
    """The network of 8 x 8 digits, layer by layer: stored weights and seeds are of this one."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, images):
        return self.head(self.features(images))


@pytest.mark.parametrize(
    "make", [DigitsCNN, lambda: SmallCNN(1, (8, 8), 10)], ids=["digits", "cnn"]
)
def test_the_cnn_of_digits_is_bit_for_bit_what_it_was(make):
    torch.manual_seed(5)
    written = Written()
    torch.manual_seed(5)
    ours = make()
    expected, found = written.state_dict(), ours.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    images = torch.rand(7, 1, 8, 8)
    assert torch.equal(ours(images), written(images))


@pytest.mark.parametrize(("make", "channels", "size"), CASES, ids=names)
def test_rows_are_exact_and_none_is_slow(make, channels, size):
    checked = gs.check(make(channels, size, 7), blank(channels, size), loss=cross_entropy)
    assert checked.exact and not checked.slow and checked.refused is None


@pytest.mark.parametrize(("make", "channels", "size"), CASES, ids=names)
def test_a_loss_depends_on_its_own_sample_alone(make, channels, size):
    model, (images, labels) = make(channels, size, 7).double(), blank(channels, size)
    images = images.double()
    together = cross_entropy(model, (images, labels))
    alone = torch.cat(
        [cross_entropy(model, (images[k : k + 1], labels[k : k + 1])) for k in range(3)]
    )
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("make", MAKERS, ids=names)
def test_every_parameter_and_every_pixel_counts(make):
    """Of sizes that no stride divides: no border is cut off."""
    model, images = make(2, (37, 21), 4).double(), torch.rand(2, 2, 37, 21, dtype=torch.float64)
    images.requires_grad_()
    cross_entropy(model, (images, torch.tensor([1, 3]))).sum().backward()
    assert all((p.grad != 0).any() for p in model.parameters())
    used = (images.grad != 0).any(0).any(0)
    # two poolings of the CNN leave out what 4 does not divide, but for what 3x3 kernels see of it
    assert used[:36, :20].all() if make is SmallCNN else used.all()


def test_a_small_cnn_says_which_images_are_too_small():
    with pytest.raises(InputError, match="at least 4 x 4 pixels, got 3 x 80"):
        SmallCNN(1, (3, 80), 10)
    assert SmallCNN(1, (4, 4), 10)(torch.rand(2, 1, 4, 4)).shape == (2, 10)


def test_a_small_cnn_stays_small():
    sizes = [
        sum(p.numel() for p in SmallCNN(3, (n, n), 10).parameters()) for n in (32, 35, 36, 224)
    ]
    assert len(set(sizes)) == 1


def test_resnet18_is_that_of_the_paper():
    """11,689,512 weights for ImageNet; a stem for 32 x 32 images keeps their resolution."""
    assert sum(p.numel() for p in resnet18(3, (224, 224), 1000).parameters()) == 11_689_512
    model = resnet18(3, (63, 64), 10)
    assert model.conv1.weight.shape == (64, 3, 3, 3) and not hasattr(model, "maxpool")
    assert resnet18(3, (64, 64), 10).conv1.weight.shape == (64, 3, 7, 7)


def test_a_narrow_resnet18_is_a_quarter_as_wide():
    model = resnet18(1, (28, 28), 10, width=16)
    assert model.fc.in_features == 128
    assert sum(p.numel() for p in model.parameters()) == 701_178
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.num_channels // norm.num_groups for norm in norms} == {2, 4}
    names = list(model.state_dict())
    assert names[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert {"layer2.0.downsample.1.bias", "layer4.1.bn2.weight", "fc.bias"} < set(names)
    assert "layer1.0.downsample.0.weight" not in names


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (28, 28), (33, 17), (7, 500), (224, 224)])
def test_patches_are_few_and_square(size):
    model = SmallViT(1, size, 10)
    patches = model.patches(torch.rand(1, 1, *size))
    assert patches[0, 0].numel() <= 64
    assert model.positions.shape[1] == patches[0, 0].numel() + 1
    assert model.patches.kernel_size[0] == model.patches.kernel_size[1]


def test_layers_of_a_transformer_begin_apart():
    layers = SmallViT(1, (8, 8), 10).encoder.layers
    assert not torch.equal(layers[0].linear1.weight, layers[1].linear1.weight)
