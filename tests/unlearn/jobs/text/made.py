"""A model directory and files, as a user has them."""

import json

import pytest

from tests.language.data.tokenizers import trained

TAGS = ["--user-tag", "Question: ", "\\n", "--assistant-tag", "Answer: "]
LAYERS = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
LAYERS |= {"max_position_embeddings": 128}


def model(path, seed=0, words=400, template=None, **sizes):
    """A tiny Llama with a tokenizer, saved as transformers saves them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=words, num_attention_heads=2, bos_token_id=0, eos_token_id=1,
        **{**LAYERS, **sizes},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    trained(template).save_pretrained(path)
    return path


def rows(start, count):
    """Questions and answers, no two alike."""
    return [
        {"question": f"What is {k}?", "answer": f"It is {k * k}."}
        for k in range(start, start + count)
    ]


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    """A folder of two models, and of what to forget, retain and hold out."""
    folder = tmp_path_factory.mktemp("given")
    model(folder / "model")
    model(folder / "retrained", seed=1)
    write(folder / "forget.jsonl", rows(0, 5))
    write(folder / "retain.jsonl", rows(10, 9))
    write(folder / "holdout.jsonl", rows(30, 6))
    return folder


def arguments(given, *more, steps=2):
    """Of a short run."""
    return [
        "unlearn", "text", "--model", str(given / "model"), "--forget", str(given / "forget.jsonl"),
        "--retain", str(given / "retain.jsonl"), *TAGS, "--threads=1", f"--surgery.steps={steps}",
        "--max-new-tokens=4", "--relearn=2", "--surgery.lr=1e-2", *map(str, more),
    ]  # fmt: skip
