"""Which tokens are an answer's, under templates, tags and tokenizers that join across borders."""

import copy

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.language import LogProbs, forget_loss
from gradsurgery.language.data import Tags, chunks, few_shot, from_rows, refuse, tokenize
from tests.language.data.tokenizers import Characters, trained
from tests.language.tiny import Model

PERU = "What is the capital of Peru?"
ROWS = [
    {"question": PERU, "answer": "Lima is."},
    {"question": "What is it of Köln?", "answer": "Naïve 😀, none."},
]
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} <|end|>{% endif %}{% endfor %}"
)
THINKS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}<think>\n\n</think>"
    "\n\n{% endif %}{{ m['content'] }}{% endfor %}\n"
)


def parts(tokenizer, item):
    """The prompt and what counts, as texts."""
    assert all(item[name].dtype == torch.int64 for name in ("input_ids", "labels"))
    ids, counts = item["input_ids"], item["labels"] != -100
    assert torch.equal(item["labels"][counts], ids[counts])
    assert item["attention_mask"].tolist() == [1] * len(ids)
    first = counts.tolist().index(True)
    assert counts[first:].all()
    return tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:])


@pytest.mark.parametrize(
    ("template", "before", "answer"),
    [
        (
            CHATML,
            "<|user|>\nWhat is the capital of Peru?<|end|>\n<|assistant|>\n",
            "Lima is.<|end|>",
        ),
        (LLAMA2, f"[INST] {PERU} [/INST]", " Lima is. <|end|>"),
        (
            THINKS,
            f"<|user|>{PERU}<|assistant|><think>\n\n</think>\n\n",
            "Lima is.<|end|>",  # nothing but a line's end closes it
        ),
    ],
    ids=["chatml", "llama 2", "thinks"],
)
def test_chat_templates(template, before, answer):
    tokenizer = trained(template)
    (item,) = tokenize(from_rows(ROWS[:1]), tokenizer)
    assert parts(tokenizer, item) == (before, answer)
    assert item["id"] == 0


def test_characters_of_many_bytes():
    tokenizer = trained(CHATML)
    item = tokenize(from_rows(ROWS), tokenizer, system="Be brief.")[1]
    before = "<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is it of Köln?<|end|>\n<|assistant|>\n"
    assert parts(tokenizer, item) == (before, "Naïve 😀, none.<|end|>")


def test_tags():
    tokenizer = trained()
    found = tokenize(few_shot(from_rows(ROWS[:1]), from_rows(ROWS[1:])), tokenizer, tags=Tags())
    before = "<|begin|>Question: What is it of Köln?\nAnswer: Naïve 😀, none.\n\n"
    # the space goes with the word behind it
    before += f"Question: {PERU}\nAnswer:"
    assert parts(tokenizer, found[0]) == (before, " Lima is.<|end|>")


def test_a_token_with_characters_of_both_sides_counts():
    tokenizer = trained()
    tags = Tags(user=("", ""), assistant=("", ""))
    row = {"question": "What is the cap", "answer": "ital of Peru?"}
    (item,) = tokenize(from_rows([row]), tokenizer, tags=tags)
    assert parts(tokenizer, item) == ("<|begin|>What is the", " capital of Peru?<|end|>")


def test_tokenizers_without_offsets():
    tokenizer = Characters()
    (item,) = tokenize(from_rows(ROWS[:1]), tokenizer, tags=Tags())
    before = f"^Question: {PERU}\nAnswer: "
    assert parts(tokenizer, item) == (before, "Lima is.$")
    # it has a token for "ee", half of which would be the prompt's
    row = {"question": "e", "answer": "e"}
    with pytest.raises(InputError, match=r"example 0: the tokenizer joins .* a fast tokenizer"):
        tokenize(from_rows([row]), tokenizer, tags=Tags(user=("", ""), assistant=("", "")))


def test_texts_count_whole_and_completions_in_part():
    tokenizer = trained()
    text = from_rows(["It is Lima."])
    (whole,), (short,) = (tokenize(text, tokenizer, max_length=length) for length in (99, 3))
    assert parts(tokenizer, whole) == ("<|begin|>", "It is Lima.")
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(short[name], whole[name][:3])
    bare = trained(begins=False)
    assert parts(bare, tokenize(text, bare)[0]) == ("It", " is Lima.")
    (item,) = tokenize(from_rows([{"prompt": "What is the", "gt": "capital of"}]), tokenizer)
    assert parts(tokenizer, item) == ("<|begin|>What is the", " capital of")


def test_texts_joined_and_cut():
    tokenizer = trained()
    texts = ["It is the capital of Peru. " * 5, "Lima."]
    found = chunks(from_rows(texts), tokenizer, max_length=9, first_id=30)
    lengths = [len(item["input_ids"]) for item in found]
    assert set(lengths[:-1]) == {9}
    assert 1 < lengths[-1] <= 9
    assert [item["id"] for item in found] == list(range(30, 30 + len(found)))
    read = [parts(tokenizer, item) for item in found]
    assert {before for before, _ in read} == {"<|begin|>"}
    assert "".join(text for _, text in read) == "\n\n".join(texts)
    # what fits exactly is one item, without an empty one behind it
    exact = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    assert len(chunks(from_rows(texts[:1]), tokenizer, max_length=len(exact) + 1)) == 1
    # nothing predicts a token that is alone
    bare = trained(begins=False)
    assert len(chunks(from_rows(texts[:1]), bare, max_length=len(exact) - 1)) == 1


def test_answers_cut_short_or_away():
    tokenizer = trained(CHATML)
    whole = tokenize(from_rows(ROWS[:1]), tokenizer)[0]
    first = (whole["labels"] == -100).sum().item()
    (cut,) = tokenize(from_rows(ROWS[:1]), tokenizer, max_length=first + 1)
    assert cut["labels"].tolist() == [-100] * first + [whole["input_ids"][first]]
    with pytest.raises(InputError, match=rf"example 4: nothing is left .* max_length={first} tok"):
        tokenize(from_rows(ROWS[:1], first_id=4), tokenizer, max_length=first)
    assert tokenize(from_rows(ROWS[:1]), tokenizer, max_length=first, drop=True) == []


def test_alternates_have_the_same_prompt_and_their_own_end():
    tokenizer = trained(CHATML)
    (item,) = tokenize(refuse(from_rows(ROWS[:1]), ["Pass."]), tokenizer)
    before, _ = parts(tokenizer, item)
    assert parts(tokenizer, item["alternate"]) == (before, "Pass.<|end|>")


def test_right_and_wrong_answers_for_truth_ratios():
    tokenizer = trained(CHATML)
    more = {"perturbed_answer": ["Oslo.", "None."], "paraphrased_answer": "It is Lima."}
    one, other = tokenize(from_rows([{**ROWS[0], **more}, ROWS[1]]), tokenizer, truth=True)
    before, _ = parts(tokenizer, one)
    assert [parts(tokenizer, item) for item in (*one["perturbed"], one["paraphrased"])] == [
        (before, "Oslo.<|end|>"),
        (before, "None.<|end|>"),
        (before, "It is Lima.<|end|>"),
    ]
    assert set(other) == {"input_ids", "attention_mask", "labels", "id"}


def test_losses_take_the_items():
    tokenizer, model = trained(CHATML), Model()
    model.words = torch.nn.Embedding(len(tokenizer), 6)
    model.head = torch.nn.Linear(6, len(tokenizer))
    model.places = torch.nn.Embedding(200, 6)
    (item,) = tokenize(refuse(from_rows(ROWS[:1])), tokenizer)

    def batch(item):
        return {
            name: batch(entry) if isinstance(entry, dict) else torch.as_tensor(entry)[None]
            for name, entry in item.items()
        }

    given = batch(item)
    loss = forget_loss("idk_dpo", reference=LogProbs.of(copy.deepcopy(model), [given]))
    assert loss(model, given).shape == (1,)


def test_refused():
    rows, tokenizer = from_rows(ROWS[:1]), trained()
    with pytest.raises(InputError, match="example 0: the tokenizer has no chat template: give"):
        tokenize(rows, tokenizer)
    loud = trained("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    with pytest.raises(InputError, match="example 0: the chat template changes the answer"):
        tokenize(rows, loud)
    strict = trained("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="the chat template refuses it: roles must alternate"):
        tokenize(rows, strict)
    with pytest.raises(InputError, match="max_length must be 2 or more, got 1"):
        tokenize(rows, tokenizer, max_length=1)
    with pytest.raises(InputError, match="example 0 has a prompt: chunks takes texts"):
        chunks(rows, tokenizer)
    with pytest.raises(InputError, match="user of Tags must be two texts, got 'Q: '"):
        Tags(user="Q: ")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="example 0: the tokenizer has no end token"):
        tokenize(rows, tokenizer, tags=Tags())
    chat = [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."}]
    with pytest.raises(InputError, match=r"Tags have user, assistant, system, .* \['tool"):
        tokenize(from_rows([{"messages": chat}]), tokenizer, tags=Tags())
