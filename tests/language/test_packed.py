"""Packed batches: rows by document, those of each document alone in float64."""

import copy
import warnings

import pytest
import torch

import gradsurgery as gs
from gradsurgery.language import Frozen, LogProbs, forget_loss, retain_loss, unpacked
from tests.capture.oracle import check, loop

transformers = pytest.importorskip("transformers")

# whether attention in this transformers keeps the documents of a row apart
APART = tuple(map(int, transformers.__version__.split(".")[:3])) >= (4, 53, 1)
UPDATE = r"update to 4.53.1 or newer.*unpacked"
LENGTHS = [5, 3, 8, 4]
SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(attention="sdpa"):
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24)
    config._attn_implementation = attention
    return transformers.LlamaForCausalLM(config).double().eval()


def documents(lengths=LENGTHS):
    found = []
    for k, length in enumerate(lengths):
        ids = torch.randint(37, (1, length))
        labels = ids.clone()
        labels[:, : k % 3] = -100  # a prompt
        found.append({"input_ids": ids, "labels": labels, "id": torch.tensor([10 + k])})
    return found


def packed(parts):
    """As transformers' DataCollatorWithFlattening has it."""
    return {
        "input_ids": torch.cat([part["input_ids"] for part in parts], 1),
        "labels": torch.cat([part["labels"] for part in parts], 1),
        "position_ids": torch.cat(
            [torch.arange(part["labels"].shape[1])[None] for part in parts], 1
        ),
        "id": torch.cat([part["id"] for part in parts])[None],
    }


def padded(parts):
    """The same documents by hand, one a row."""
    longest = max(part["labels"].shape[1] for part in parts)

    def rows(name, fill):
        found = torch.full((len(parts), longest), fill)
        for row, part in zip(found, parts, strict=True):
            row[: part[name].shape[1]] = part[name][0]
        return found

    lengths = torch.tensor([[part["labels"].shape[1]] for part in parts])
    return {
        "input_ids": rows("input_ids", 0),
        "labels": rows("labels", -100),
        "attention_mask": (torch.arange(longest) < lengths).long(),
    }


def served(loss, model, batch):
    """A packed batch, which is refused where documents would meet, and the same one a row."""
    if APART:
        return [batch, unpacked(batch)]
    with pytest.raises(gs.InputError, match=UPDATE):
        loss(model, batch)
    return [unpacked(batch)]


def made(name, model, parts):
    original = copy.deepcopy(model)
    with torch.no_grad():
        for p in original.parameters():
            p.add_(0.02 * torch.randn_like(p))
    if name in ("npo", "dpo"):
        known = packed(parts) if APART else unpacked(packed(parts))
        return forget_loss(name, reference=LogProbs.of(original, [known]))
    if name == "undial":
        return forget_loss(name, reference=Frozen(original))
    if name == "rmu":
        return forget_loss(name, layer="model.layers.1")
    return retain_loss("kl", reference=Frozen(original)) if name == "kl" else forget_loss(name)


LOSSES = ["grad_ascent", "npo", "simnpo", "undial", "ceu", "rmu", "kl"]


@pytest.mark.parametrize("name", LOSSES)
def test_rows_are_those_of_each_document_alone(name):
    model, parts = llama(), documents()
    loss = made(name, model, parts)
    alone = torch.cat([loss(model, part) for part in parts])
    for batch in served(loss, model, packed(parts)):
        with gs.tape(model) as tape:
            losses = loss(model, batch)
        torch.testing.assert_close(losses, alone, rtol=1e-9, atol=1e-9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jacobian = tape.jacobian(losses)
        check(jacobian, model, loop(alone, model), 1e-8)


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_tokens_hold_several_documents_each(rows):
    model, parts = llama(), documents([5, 3, 4, 4] if rows == 2 else LENGTHS)
    cut = [parts[:2], parts[2:]] if rows == 2 else [parts]
    batches = [packed(some) for some in cut]
    batch = {name: torch.cat([b[name] for b in batches]) for name in batches[0] if name != "id"}
    loss = forget_loss("grad_ascent")
    alone = torch.cat([loss(model, part) for part in parts])
    for taken in served(loss, model, batch):
        with gs.tape(model) as tape:
            losses = loss(model, taken)
        if rows == 1 or taken is not batch:
            jacobian = tape.jacobian(losses)
        else:  # samples lie in two dimensions at once, which no formula of a norm knows
            with pytest.warns(UserWarning, match="no formula for MulBackward0"):
                jacobian = tape.jacobian(losses)
        check(jacobian, model, loop(alone, model), 1e-8)


def test_positions_that_jump_begin_a_document():
    model, parts = llama(), documents([5, 4])
    batch = packed(parts)
    batch["position_ids"][:, 5:] += 9  # forward, and what llama looks at is how far apart they are
    loss = forget_loss("simnpo")
    alone = torch.cat([loss(model, part) for part in parts])
    for taken in served(loss, model, batch):
        torch.testing.assert_close(loss(model, taken), alone, rtol=1e-7, atol=1e-7)


def test_what_the_collator_of_transformers_makes():
    model, parts = llama(), documents()
    features = [
        {name: part[name][0].tolist() for name in ("input_ids", "labels")} for part in parts
    ]
    collate = transformers.DataCollatorWithFlattening(**({"return_seq_idx": True} if APART else {}))
    batch = dict(collate(features))
    loss = forget_loss("simnpo")
    alone = torch.cat([loss(model, part) for part in parts])
    plain = {name: entry for name, entry in batch.items() if name != "seq_idx"}
    for taken in (*served(loss, model, plain), unpacked(batch)):
        torch.testing.assert_close(loss(model, taken), alone, rtol=1e-9, atol=1e-9)


def test_steps_of_a_surgeon():
    """Of packed batches, and of the same documents in padded ones."""
    model, loss, steps = llama(), forget_loss("grad_ascent"), []
    parts = documents([5, 8]), documents([4, 6, 3])
    for form in (padded, lambda some: unpacked(packed(some)), packed):
        twin = copy.deepcopy(model)
        surgeon = gs.Surgeon(twin, torch.optim.SGD(twin.parameters(), lr=0.5), gs.OrthoGrad())
        forget, retain = map(form, parts)
        for batch in (forget, retain):
            batch.pop("id", None)  # as long as one another: they could be joined
        if form is packed and not APART:
            with pytest.raises(gs.InputError, match=UPDATE):
                surgeon.step(forget=forget, retain=retain, loss=loss)
            for mine, before in zip(twin.parameters(), model.parameters(), strict=True):
                assert torch.equal(mine, before)
            continue
        surgeon.step(forget=forget, retain=retain, loss=loss)
        surgeon.add(forget=forget, loss=loss)
        surgeon.add(retain=retain, loss=retain_loss("nll"))
        assert len(surgeon.step().losses) == 4  # one for each document to retain
        steps.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    for other in steps[1:]:
        torch.testing.assert_close(other, steps[0], rtol=1e-7, atol=1e-9)


def test_attention_that_mixes_documents_is_refused():
    parts = documents()
    loss, batch = forget_loss("grad_ascent"), packed(parts)
    for model in (llama("eager"), transformers.GPT2LMHeadModel(gpt2()).double().eval()):
        with gs.tape(model) as tape:
            first, *_ = served(loss, model, batch)  # which is the packed one, or it was refused
            losses = loss(model, first)
        if APART:
            with pytest.raises(gs.CoupledSamplesError):
                tape.jacobian(losses)
    model = llama()
    masked = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    with pytest.raises(gs.InputError, match=r"attention_mask.*unpacked"):
        loss(model, masked)
    alone = torch.cat([loss(model, part) for part in parts])
    torch.testing.assert_close(loss(model, unpacked(masked)), alone, rtol=1e-9, atol=1e-9)


def test_transformers_that_reads_no_position_ids_is_refused(monkeypatch):
    if APART:
        monkeypatch.delattr(transformers.masking_utils, "find_packed_sequence_indices")
    batch = packed(documents())
    with pytest.raises(gs.InputError, match=UPDATE):
        forget_loss("grad_ascent")(llama(), batch)
    assert len(unpacked(batch)["input_ids"]) == len(LENGTHS)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=37, n_embd=16, n_layer=1, n_head=2, n_positions=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


def test_bounds_that_attention_does_not_see_are_refused():
    model, loss, batch = llama(), forget_loss("grad_ascent"), packed(documents())
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    index = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))[None]
    alone = {name: batch[name] for name in ("input_ids", "labels")}
    for name, entry in (("seq_idx", index), ("cu_seq_lens_q", ends)):
        with pytest.raises(gs.InputError, match=f"packed by {name}"):
            loss(model, {**alone, name: entry})
        with pytest.raises(gs.InputError, match=f"packed by {name}"):
            unpacked({**alone, name: entry})
        assert unpacked({**batch, name: entry})["input_ids"].shape == (4, 8)


def test_what_takes_samples_apart_says_what_to_do():
    model, batch = llama(), packed(documents())
    loss = forget_loss("grad_ascent")
    for options in ({"micro_batch": 2}, {"rows": "stored"}):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        surgeon = gs.Surgeon(model, optimizer, gs.UPGrad(), **options)
        with pytest.raises(gs.InputError, match="unpacked"):
            surgeon.step(batch=batch, loss=loss)
    why = r"as_published of KL.*unpacked" if APART else UPDATE
    with pytest.raises(gs.InputError, match=why):
        retain_loss("kl", reference=Frozen(copy.deepcopy(model)), as_published=True)(model, batch)


def test_batches_that_are_not_packed_stay_as_they_are():
    ids = torch.randint(37, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # of padding on the left
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}
    assert unpacked(batch) is batch
    labels = torch.tensor([[1, 2, 3, -100, -100]])
    behind = {"labels": labels, "position_ids": torch.tensor([[0, 1, 2, 0, 0]])}
    assert unpacked(behind) is behind


def test_a_document_without_labels_is_named():
    parts = documents()
    parts[1]["labels"][:] = -100
    loss, model = forget_loss("grad_ascent"), llama()
    for taken in served(loss, model, packed(parts)):
        with pytest.raises(gs.InputError, match=r"labels of sample 1( \(id 11\))? are all masked"):
            loss(model, taken)
    batch = {**packed(documents()), "extra": torch.zeros(3, 2)}
    with pytest.raises(gs.InputError, match="extra of a packed batch"):
        unpacked(batch)
