"""--model and --checkpoint: a network and all its weights, or one line that says what is wrong."""

import os
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.images.networks import load_checkpoint, network
from gradsurgery.unlearn.jobs.networks import SmallCNN, SmallViT

NETS = """
import sys
import torch
from torch import nn

def linear(channels, size, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], classes))

def some(*, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

def all_of_them(**given):
    assert set(given) == {"channels", "size", "classes"}
    return linear(**given)

class Named(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.inner = some(classes=classes)

    def forward(self, images):
        return {"logits": self.inner(self.norm(images + 1))}

def raises(classes):
    return undefined

def more(classes, depth):
    pass

def nothing():
    return None

def features():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))

def planes():
    return nn.Conv2d(1, 5, 1)

def wrong():
    return nn.Linear(7, 5)

def without_parameters():
    return nn.Flatten()

class Infinite(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.inner = some(classes=classes)

    def forward(self, images):
        return self.inner(images) / 0

def quits():
    sys.exit("no such thing")

class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, images):
        return self.outer(images)

value = 3
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of networks in the current directory, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "own_broken.py").write_text("def f(:\n")
    (tmp_path / "own_needy.py").write_text("\n\nimport not_installed\n")
    yield
    for name in ("own_nets", "own_broken", "own_needy"):
        sys.modules.pop(name, None)


def test_networks_by_name():
    assert type(network("cnn", 1, (8, 8), 10)) is SmallCNN
    assert type(network("vit", 3, (9, 9), 10)) is SmallViT
    assert network("resnet18", 3, (9, 9), 12).fc.out_features == 12


@pytest.mark.parametrize("name", ["linear", "some", "all_of_them", "Named"])
def test_networks_of_the_users_own_are_given_what_they_take(nets, name):
    before, state = list(sys.path), torch.get_rng_state()
    model = network(f"own_nets:{name}", 1, (4, 6), 5)
    assert any(p.shape == (5, 24) for p in model.parameters())
    assert sys.path == before
    if name != "linear" and name != "all_of_them":
        assert torch.equal(torch.get_rng_state(), state)  # of trying it out, nothing is left


def test_trying_a_network_out_leaves_no_trace(nets):
    model = network("own_nets:Named", 1, (4, 6), 5)
    assert all(module.training for module in model.modules())
    assert not model.norm.running_mean.any() and model.norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "lenet",
            "--model must be one of cnn, cnn-narrow, resnet18, resnet18-narrow, vit, or "
            "module.*, got lenet",
        ),
        (":linear", "--model must be one of"),
        ("own_nets:", "--model must be one of"),
        ("no_nets:f", "importing no_nets failed: ModuleNotFoundError: No module named 'no_nets'$"),
        ("own_nets.py:f", "importing own_nets.py failed: ModuleNotFoundError: .* not a package$"),
        (".:f", "importing . failed: "),
        ("own_needy:f", r"ModuleNotFoundError: No module named 'not_installed' \(.*, line 3\)"),
        ("own_broken:f", r"importing own_broken failed: SyntaxError: .*\(own_broken.py, line 1\)"),
        ("own_nets:lost", "own_nets.py has no function named lost"),
        ("own_nets:value", "own_nets.py has no function but a value named value"),
        ("own_nets:raises", r"raises failed: NameError: name 'undefined' .*own_nets.py, line 26\)"),
        ("own_nets:more", "more failed: TypeError: .*missing 1 required .*'depth'$"),
        ("own_nets:quits", r"quits failed: SystemExit: no such thing"),
        ("own_nets:nothing", "nothing must return an nn.Module, got NoneType"),
        ("own_nets:features", r"images \[2, 1, 4, 6\], must return logits \[2, 5\], got \[2, 3\]"),
        ("own_nets:planes", r"model must return logits, .* got float32 \[2, 5, 4, 6\]"),
        ("own_nets:wrong", "given images .* failed: RuntimeError: mat1 and mat2 shapes"),
        ("own_nets:Inside", r"failed: AttributeError: .*'outer' \(.*own_nets.py, line 63\)"),
        ("own_nets:Infinite", r"given images \[2, 1, 4, 6\], must return finite logits$"),
        ("own_nets:without_parameters", "the model has no parameters to train"),
    ],
)
def test_what_fails_is_one_line(nets, spec, message):
    before = list(sys.path)
    with pytest.raises(InputError, match=message) as caught:
        network(spec, 1, (4, 6), 5)
    assert str(caught.value).startswith("--model")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    assert sys.path == before


def test_images_too_small_for_a_network_of_ours():
    with pytest.raises(InputError, match=r"^--model cnn: .* at least 4 x 4 pixels, got 3 x 9"):
        network("cnn", 1, (3, 9), 10)


# -- weights


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def same(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def lightning(state):
    return {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}


def parallel(state, prefix="module."):
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.PTH", "w.bin"])
@pytest.mark.parametrize("wrapped", [dict, parallel])
def test_weights_come_back(tmp_path, name, wrapped):
    trained, model, path = make(1), make(2), tmp_path / name
    save = save_file if name == "w.safetensors" else torch.save
    save(wrapped(trained.state_dict()), path)
    load_checkpoint(model, path)
    assert same(model, trained)


@pytest.mark.parametrize(
    "wrapped",
    [
        lightning,
        lambda state: {"model": state},
        lambda state: lightning(parallel(state)),
        lambda state: parallel(parallel(state, "_orig_mod.")),
        lambda state: (
            {name: value.double() for name, value in state.items() if value.dim()}
            | {name: value for name, value in state.items() if not value.dim()}
        ),
    ],
)
def test_weights_within_a_training_checkpoint_come_back(tmp_path, wrapped):
    trained, model, path = make(1), make(2), tmp_path / "w.pt"
    torch.save(wrapped(trained.state_dict()), path)
    load_checkpoint(model, path)
    assert same(model, trained)


def test_names_of_the_models_own_that_begin_alike_stay(tmp_path):
    trained, model = (nn.ModuleDict({"module": make(seed)}) for seed in (1, 2))
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt")
    assert same(model, trained)


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def changed(name, value):
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("1.bias"), "is not of this model: it has no 1.bias$"),
        (lambda s: (s.pop("1.bias"), s.pop("3.bias")), "it has no 1.bias nor 1 more$"),
        (changed("4.bias", torch.ones(2)), "is not of this model: the model has no 4.bias$"),
        (lambda s: s.update({"4": s.pop("1.bias")}), "it has no 1.bias, and the model has no 4$"),
        (changed("3.weight", torch.ones(4, 3)), r"3.weight must be \[3, 4\], got \[4, 3\]"),
        (changed("3.bias", torch.tensor([0, 1, torch.nan])), "3.bias holds .* not finite"),
        (
            changed("3.bias", torch.tensor([0, 1, 1e300], dtype=torch.float64)),
            "3.bias holds .* not finite",
        ),
        (changed("3.bias", torch.ones(3).to_sparse()), "into dense float32, it is sparse_coo"),
        (changed("3.bias", torch.ones(3, dtype=torch.int8)), "float32, it is dense int8"),
        (changed("3.bias", torch.ones(3, device="meta")), "3.bias cannot be put into"),
        (changed("3.bias", "text"), "must hold tensors by name, .* got str under '3.bias'"),
        (changed(3, torch.ones(3)), "must hold tensors by name, .* got Tensor under 3"),
        (changed("3.bias", Code()), "holds more than tensors, .*mkdir for one, .* would run code"),
        (lambda s: s.clear(), "must hold tensors by name, .* got nothing"),
    ],
)
def test_wrong_weights_change_nothing(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    state, model, path = dict(make(1).state_dict()), make(2), tmp_path / "w.pt"
    change(state)
    torch.save(state, path)
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(model, path)
    assert str(caught.value).startswith(f"--checkpoint: {path}")
    assert same(model, make(2)) and not (tmp_path / "ran").exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(make(1), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"torch.nn.modules.\S+ for one, .* save model.state_dict"):
        load_checkpoint(make(), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"hello", bytes(3000), bytes(range(256)) * 9, "half"])
def test_what_is_no_checkpoint_is_one_line(tmp_path, name, content):
    path = tmp_path / name
    save = save_file if name == "w.safetensors" else torch.save
    save({"1.weight": torch.ones(40, 60)}, path)
    path.write_bytes(path.read_bytes()[:4000] if content == "half" else content)
    with pytest.raises(InputError, match=r"^--checkpoint: \S+ (is not a whole file|holds more)"):
        load_checkpoint(make(), path)


def test_paths_that_are_no_file(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for name, message in (
        ("folder.pt", "is a folder"),
        ("none.pt", "is not there"),
        ("a\0b.pt", "is not there"),
        ("w.ckpt", "must end in .safetensors, .pt, .pth, .bin"),
    ):
        with pytest.raises(InputError, match=message):
            load_checkpoint(make(), tmp_path / name)
