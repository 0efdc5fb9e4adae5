"""What is read of a batch and of a model's output, and what is refused by name."""

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery import language
from tests.language.test_losses import EXACT
from tests.language.tiny import SAMPLES, WORDS, batch, log_p, made, tokens


def test_sums_and_counts():
    model, given = made(), batch(SAMPLES)
    logits = model(given["input_ids"], given["attention_mask"])
    sums, counts = language.log_probs(logits, given["labels"], given["attention_mask"])
    expected = [sum(log_p(z, y) for z, y in tokens(model, sample)) for sample in SAMPLES]
    torch.testing.assert_close(sums, torch.stack(expected), **EXACT)
    assert counts.tolist() == [4, 1, 2, 6, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_float32(dtype):
    logits = (5 * torch.randn(3, 200, 50)).to(dtype)
    labels = torch.randint(50, (3, 200))
    sums, _ = language.log_probs(logits, labels)
    exact, _ = language.log_probs(logits.double(), labels)
    assert (sums.dtype, exact.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(sums.double(), exact, atol=0, rtol=1e-6)


class Prompted(nn.Module):
    """Places in front of the text, as prompt tuning has them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        logits = self.model(input_ids, attention_mask)
        return {"logits": torch.cat([torch.randn_like(logits[:, :3]), logits], 1)}


def test_logits_longer_than_labels_are_those_of_the_last_positions():
    model, given = made(), batch(SAMPLES)
    found = language.NLL()(Prompted(model), given)
    torch.testing.assert_close(found, language.NLL()(model, given), **EXACT)


def test_the_model_is_given_what_is_its_own():
    seen = {}

    class Spy(nn.Module):
        def forward(self, **given):
            seen.update(given)
            return torch.zeros(5, 8, WORDS)

    given = batch(SAMPLES)
    language.NLL()(Spy(), {**given, "position_ids": given["input_ids"], "alternate": given})
    assert set(seen) == {"input_ids", "attention_mask", "position_ids"}


def masked(sample):
    given = batch(SAMPLES)
    given["labels"][sample] = -100
    return given


@pytest.mark.parametrize("name", ["nll", "rmu", "simnpo"])
def test_a_sample_without_labels_is_named(name):
    losses = {"nll": language.NLL(), "rmu": language.RMU(layer="layers.0")}
    loss = losses.get(name, language.SimNPO())
    with pytest.raises(gs.InputError, match=r"labels of sample 3 \(id 53\) are all masked"):
        loss(made(), masked(3))


def test_a_sample_without_an_id_is_named_by_its_place():
    given = masked(2)
    with pytest.raises(gs.InputError, match="labels of sample 2 are all masked"):
        language.log_probs(torch.zeros(5, 8, WORDS), given["labels"])


def test_ceu_names_an_answer_that_is_too_short():
    with pytest.raises(gs.InputError, match=r"sample 1 \(id 51\).*after the first 1$"):
        language.forget_loss("ceu")(made(), batch(SAMPLES))


LABELS = batch(SAMPLES)["labels"]
BAD = {
    "no labels": ({"input_ids": LABELS}, r"no labels, only \['input_ids'\]"),
    "no mapping": ([LABELS], "must be a mapping with labels, got list"),
    "a list": ({"labels": [[1, 2]]}, r"labels must be integers \[B, T\], got list"),
    "floats": ({"labels": LABELS.double()}, r"integers \[B, T\], got float64 \[5, 8\]"),
    "flat": ({"labels": LABELS[0]}, r"integers \[B, T\], got int64 \[8\]"),
    "empty": ({"labels": LABELS[:0]}, r"integers \[B, T\], got int64 \[0, 8\]"),
    "too large": (
        {"input_ids": LABELS.abs(), "labels": LABELS.where(LABELS != 8, 113)},
        r"labels must be in \[0, 113\), the model's tokens, got 113",
    ),
    "negative": (
        {"input_ids": LABELS.abs(), "labels": LABELS.where(LABELS != 8, -1)},
        "labels must be tokens or -100, got -1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_batches_are_named(name):
    given, message = BAD[name]
    with pytest.raises(gs.InputError, match=message) as raised:
        language.NLL()(made(), given)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(5, 7, WORDS), r"logits must be \[5, 8 or more, ...\].*got \[5, 7, 113\]"),
        (torch.zeros(4, 8, WORDS), r"got \[4, 8, 113\]"),
        (torch.zeros(5, 8), r"got \[5, 8\]"),
        (torch.zeros(5, 8, WORDS).long(), r"must return logits.*got torch.int64"),
        ("text", "must return logits.*got str"),
    ],
    ids=["short", "fewer", "flat", "integers", "text"],
)
def test_bad_outputs_are_named(output, message):
    class Returns(nn.Module):
        def forward(self, **given):
            return output

    with pytest.raises(gs.InputError, match=message):
        language.NLL()(Returns(), batch(SAMPLES))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("layers.7", "Model has 0 modules of this name"),
        ("query", "Model has 2 modules of this name"),
        ("layers", "must be called once a pass, got 0 calls"),
    ],
)
def test_a_layer_that_is_not_one_is_named(layer, message):
    model = made()
    with pytest.raises(
        gs.InputError, match=f"layer '{layer}'.*{message}|layer '{layer}' {message}"
    ):
        language.RMU(layer=layer)(model, batch(SAMPLES))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_is_found_behind_a_prefix():
    model = made()

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = model

        def forward(self, **given):
            return self.base_model(**given)

    loss, given = language.RMU(layer="layers.1"), batch(SAMPLES)
    torch.testing.assert_close(loss(Wrapper(), given), loss(model, given))
