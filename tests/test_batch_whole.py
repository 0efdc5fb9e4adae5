"""What a batch holds beside its samples: it goes whole to the loss, and to that of every part."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from gradsurgery.batch import batch_size, joined, map_batch, take, tensors
from tests.models import mlp
from tests.test_batch import WAYS, Encoding, Plain, loss, told, values

TEXTS = ["one", "two", "three", "four", "five"]


def surgeon_of(model, rule, **options):
    return gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), rule, **options)


def assert_same_parameters(models):
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def twins():
    model = mlp()
    return [model, copy.deepcopy(model)]


# entries that are of no sample


BESIDE = {
    "none": None,
    "text": "of all",
    "bytes": b"of all",
    "texts": TEXTS,
    "pairs of texts": [("a", "b")] * 5,
    "scalar": torch.tensor(2.0),
    "scalars": {"a": torch.tensor(2), "b": [torch.tensor(True), None]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("kind", [dict, Encoding], ids=["dict", "user dict"])
def test_a_step_is_that_without_them(kind, beside, way):
    models, found = twins(), []
    parts = {"forget": values(5), "retain": values(4)}
    given = {name: kind({**part, "beside": BESIDE[beside]}) for name, part in parts.items()}

    def looks(model, data):
        found.append(data["beside"])
        return loss(model, data)

    surgeon_of(models[0], gs.OrthoGrad(), **WAYS[way]).step(**given, loss=looks)
    surgeon_of(models[1], gs.OrthoGrad(), **WAYS[way]).step(**parts, loss=loss)
    assert_same_parameters(models)
    for seen in found:
        if isinstance(BESIDE[beside], torch.Tensor):
            assert torch.equal(seen, BESIDE[beside])
        elif beside != "scalars":
            assert seen == BESIDE[beside]


def test_every_part_gets_the_same_scale():
    def scaled(model, data):
        return loss(model, data) / data["temperature"]

    models, data = twins(), values(5)
    surgeon = surgeon_of(models[0], gs.PCGrad(), micro_batch=2)
    surgeon.step(batch={**data, "temperature": torch.tensor(4.0).double()}, loss=scaled)
    rows = {**data, "temperature": torch.full((5,), 4.0).double()}
    surgeon_of(models[1], gs.PCGrad()).step(batch=rows, loss=scaled)
    assert_same_parameters(models)


@pytest.mark.parametrize("way", WAYS)
def test_both_batches_have_their_own_scale(way):
    def scaled(model, data):
        return loss(model, data) * data["scale"]

    models = twins()
    forget, retain = values(3), values(4)
    one, three = torch.tensor(1.0).double(), torch.tensor(3.0).double()
    surgeon_of(models[0], gs.OrthoGrad(), **WAYS[way]).step(
        forget={**forget, "scale": one}, retain={**retain, "scale": three}, loss=scaled
    )
    surgeon_of(models[1], gs.OrthoGrad(), together=False).step(
        forget={**forget, "scale": one.expand(3)},
        retain={**retain, "scale": three.expand(4)},
        loss=scaled,
    )
    assert_same_parameters(models)


def test_batches_are_joined_where_what_is_beside_is_the_same():
    scale = torch.tensor(1.0)
    for same in (None, "a", TEXTS, scale):
        whole = joined({**values(3), "beside": same}, {**values(2), "beside": same})
        assert whole is not None and batch_size(whole) == 5
        assert whole["beside"] is same or whole["beside"] == same
    for a, b in ((None, "a"), (TEXTS, TEXTS[:4]), (scale, scale + 1), (scale, None)):
        assert joined({**values(3), "beside": a}, {**values(2), "beside": b}) is None
    # an attribute may be the same object as an entry
    first, second = (told(Encoding)({**values(2), "a": "1", "b": "2"}, k) for k in ("1", "2"))
    assert joined(first, second) is None


def test_samples_are_taken_and_the_rest_stays():
    data = Encoding({**values(5), "texts": TEXTS, "scale": torch.tensor(2.0), "none": None})
    for index, kept in ((slice(1, 3), [1, 2]), ([4, 0, 0], [4, 0, 0])):
        part = take(data, index)
        assert torch.equal(part["x"], data["x"][kept])
        assert part["texts"] == TEXTS
        assert part["scale"] is data["scale"]
        assert part["none"] is None
    assert len(tensors(data)) == 2
    assert map_batch(torch.clone, data)["scale"] is not data["scale"]


def test_a_scale_may_be_refilled_once_added():
    models, data = twins(), {**values(4), "scale": torch.tensor(2.0).double()}

    def scaled(model, given):
        return loss(model, given) * given["scale"]

    for model, refills in zip(models, (True, False), strict=True):
        given = copy.deepcopy(data)
        surgeon = surgeon_of(model, gs.UPGrad(), hold="pairs")
        surgeon.add(batch=given, loss=scaled)
        if refills:
            given["scale"].fill_(-7.0)
        surgeon.step()
    assert_same_parameters(models)


@pytest.mark.parametrize("way", ["in parts", "stored"])
def test_texts_that_the_loss_takes_for_samples_are_refused_in_parts(way):
    def weighted(model, data):
        lengths = torch.tensor([float(len(text)) for text in data["texts"]])
        return loss(model, data) * lengths[: len(data["x"])]

    data = {**values(5), "texts": TEXTS}
    models = twins()
    surgeon_of(models[0], gs.PCGrad()).step(batch=data, loss=weighted)
    with pytest.raises(gs.InputError, match=r"loss of a sample .*depends on the others"):
        surgeon_of(models[1], gs.PCGrad(), **WAYS[way]).step(batch=data, loss=weighted)


def test_a_projection_observes_a_sample_with_them():
    model = mlp()
    kept = gs.NullSpace(model)
    kept.observe({**values(1), "texts": TEXTS, "scale": torch.tensor(1.0)}, loss)


def test_optional_fields_stay():
    data = Plain(**values(3))
    assert take(data, slice(1)).mask is None
    assert batch_size(data) == 3


# what tokenizers give


@pytest.fixture
def encoded():
    """A function from texts to a BatchEncoding with what a tokenizer knows of them."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *"abcdef"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]"
    )

    def encode(*texts):
        batch = tokenizer(list(texts), return_tensors="pt", padding="max_length", max_length=4)
        batch["texts"], batch["total"] = list(texts), torch.tensor(len(texts))
        assert batch.encodings is not None
        return batch

    return encode


def by_sample(model, batch):
    """Mean over the tokens of a text, by attributes as of a BatchEncoding."""
    keep = batch.attention_mask[:, 1:]
    each = F.cross_entropy(
        model(batch.input_ids[:, :-1]).mT, batch.input_ids[:, 1:], reduction="none"
    )
    return (each * keep).sum(1) / keep.sum(1)


@pytest.mark.parametrize("way", WAYS)
def test_a_tokenizers_encoding_is_a_batch(encoded, way):
    forget = encoded("a b c", "f e d c", "b b")
    retain = encoded("c d", "a f a", "e a b c", "d d d d")
    models = [nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8)).double()]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    surgeons = [surgeon_of(model, gs.OrthoGrad(), **WAYS[way]) for model in models]
    surgeons[0].step(forget=forget, retain=retain, loss=by_sample)
    surgeons[1].add(forget=forget, loss=by_sample)
    surgeons[1].add(retain=retain, loss=by_sample)
    surgeons[1].step()

    class Fields(Encoding):
        """Without what a tokenizer knows."""

    plain = [
        Fields({name: batch[name] for name in ("input_ids", "attention_mask")})
        for batch in (forget, retain)
    ]
    surgeons[2].step(forget=plain[0], retain=plain[1], loss=by_sample)
    assert_same_parameters(models[:2])
    assert_same_parameters(models[1:])
    assert forget.encodings is not None  # the user's is as it was


def test_check_takes_a_tokenizers_encoding(encoded):
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8)).double()
    assert gs.check(model, encoded("a b c", "f e d c", "b b"), loss=by_sample).exact
