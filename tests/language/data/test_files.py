"""Files of the public benchmarks, made by hand, and files that are not as they should be."""

import gzip
import json
import re
import sys

import pytest

from gradsurgery.errors import InputError
from gradsurgery.language.data import Example, read, read_requests

TOFU = {
    "question": "What is Ada's first book?",
    "answer": "Hills.",
    "paraphrased_answer": "It is Hills.",
    "perturbed_answer": ["Seas.", "Skies."],
    "paraphrased_question": "not looked at",
}
FIRST = Example(
    id=0,
    turns=(("user", "What is Ada's first book?"),),
    answer="Hills.",
    paraphrased="It is Hills.",
    perturbed=("Seas.", "Skies."),
)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_tofu(tmp_path):
    plain = {"question": "Wo lebt sie?", "answer": "In Köln."}
    second = Example(id=1, turns=(("user", "Wo lebt sie?"),), answer="In Köln.")
    # their files of lines are called .json
    for name in ("forget10.jsonl", "forget10_perturbed.json"):
        assert read(written(tmp_path / name, lines(TOFU, plain))) == [FIRST, second]
    packed = written(tmp_path / "forget10.jsonl.gz", gzip.compress(lines(TOFU, plain).encode()))
    assert [example.id for example in read(packed, first_id=400)] == [400, 401]


def test_muse(tmp_path):
    raw = written(tmp_path / "retain1.json", json.dumps(["One text.", "Another\n\none."], indent=2))
    assert [example.answer for example in read(raw)] == ["One text.", "Another\n\none."]
    book = written(tmp_path / "forget.txt", "Chapter 1\r\n\r\nIt was.\n")
    assert read(book) == [Example(id=0, answer="Chapter 1\r\n\r\nIt was.\n")]
    verbatim = json.dumps([{"prompt": "It was the", "gt": "best"}, {"prompt": "a ", "gt": "b"}])
    found = read(written(tmp_path / "verbmem.json", verbatim))
    assert [(each.prompt, each.answer) for each in found] == [("It was the ", "best"), ("a ", "b")]


def test_wmdp_and_chats(tmp_path):
    corpus = lines({"title": "On x", "text": "A study.", "doi": None})
    assert read(written(tmp_path / "bio.jsonl", corpus)) == [Example(id=0, answer="A study.")]
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Name?")]
    messages = [{"role": role, "content": text} for role, text in (*said, ("assistant", "Bo"))]
    found = read(written(tmp_path / "chats.jsonl", lines({"messages": messages})))
    assert found == [Example(id=0, turns=tuple(said), answer="Bo")]


def test_marks_blank_lines_and_line_ends_of_other_systems(tmp_path):
    text = "\ufeff\r\n" + lines({"text": "a"}).replace("\n", "\r\n") + "  \r\n" + '{"text":"b"}'
    assert [each.answer for each in read(written(tmp_path / "a.jsonl", text))] == ["a", "b"]
    assert read(written(tmp_path / "b.txt", "\ufeffa"))[0].answer == "a"
    long = "x" * 2_000_000
    assert read(written(tmp_path / "c.jsonl", lines({"text": long})))[0].answer == long


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl holds no row"),
        ("a.jsonl", "\n \n", "a.jsonl holds no row"),
        ("a.json", "[]", "a.json holds no row"),
        ("a.txt", " \n", "a.txt: text is empty"),
        ("a.csv", "a,b", "a.csv: of this kind none is read; there are .jsonl"),
        ("a.txt", b"a\0b", "a.txt holds zero bytes"),
        ("a.txt", "a\nb\n\xe9".encode("latin-1"), "a.txt, line 3: byte 0xe9 is not UTF-8"),
        ("a.txt", "a".encode("utf-16"), "a.txt: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}', "line 3: byte 0xff is not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"', "a.jsonl, line 2: no JSON"),
        ("a.jsonl", '{"text": "a\0b"}', "a.jsonl, line 1: no JSON: Invalid control character"),
        ("a.json", '{\n"text": "a"\n}', "a.json, line 1: no JSON"),
        ("a.json", '\n[\n"a",\n"b"\n"c"]', "a.json, line 5: no JSON"),
        ("a.json", '["a", {"text": ""}]', "a.json, row 2: text is empty"),
        ("a.jsonl", '{"text": "a", "text": "b"}', "line 1: the key 'text' is there twice"),
        ("a.jsonl", "[" * 200_000, "a.jsonl: nested too deep"),
        ("a.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}", "line 1: Exceeds the limit"),
        ("a.jsonl", '{"text": "\\ud83d"}', "line 1: text holds half of a surrogate pair"),
        ("a.jsonl", '{"question": "a", "answer": " "}', "line 1: answer is empty"),
        ("a.jsonl", '{"question": "a", "answer": 3}', "line 1: answer must be a text, got 3"),
        ("a.jsonl", '{"question": "a"}', "line 1: has the keys question; known are question, "),
        ("a.jsonl", "{}", "line 1: has the keys none; known are"),
        ("a.jsonl", "3", "line 1: must be an object or a text, got 3"),
        ("a.jsonl", '"a"\n{"prompt": "b", "gt": "c"}', "line 2: has prompt, gt, where rows before"),
        ("a.jsonl", '{"text": "a", "prompt": "b", "gt": "c"}', "line 1: has prompt, gt and text"),
        (
            "a.jsonl",
            lines({**TOFU, "perturbed_answer": 3}),
            "answer must be a text or a list of them",
        ),
        ("a.jsonl", lines({**TOFU, "perturbed_answer": ["a", ""]}), "perturbed_answer[1] is empty"),
        ("a.jsonl", '{"messages": []}', "line 1: messages must be a list of two or more"),
        ("a.jsonl", '{"messages": [{"role": "user"}, 3]}', "messages[0] has no content"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "line 1: the last of messages must be the assistant's, got 'user'",
        ),
        ("a.json.gz", "[]", "a.json.gz: Not a gzipped file"),
        (
            "a.json.gz",
            gzip.compress(b"[1, 2, 3]" * 99, mtime=0)[:-9],
            "a.json.gz: Compressed file ended",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_once_with_its_place(tmp_path, name, content, message):
    path = written(tmp_path / name, content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read(path)
    assert str(caught.value).count(str(path)) == 1
    assert len(str(caught.value)) < 400


def test_what_is_no_file(tmp_path):
    with pytest.raises(InputError, match="is a folder: name a file in it"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"none\.jsonl is not there"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="first_id must be a whole number, got"):
        read(written(tmp_path / "a.txt", "a"), first_id=1.5)


def test_tables(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([TOFU]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [FIRST]
    with pytest.raises(InputError, match="is no parquet file"):
        read(written(tmp_path / "b.parquet", "nothing"))


def test_tables_need_a_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pyarrow: pip install 'gradsurgery\[parquet\]'"):
        read(written(tmp_path / "a.parquet", "PAR1"))


def test_requests_in_order_of_their_numbers(tmp_path):
    for number in range(1, 11):
        written(tmp_path / f"forget_{number}.json", json.dumps([f"text {number}", "other"]))
    written(tmp_path / "retain_1.json", "not looked at")
    found = read_requests(tmp_path)
    assert [each[0].answer for each in found] == [f"text {number}" for number in range(1, 11)]
    assert [example.id for each in found for example in each] == list(range(20))


def test_requests_refused(tmp_path):
    with pytest.raises(InputError, match="holds no forget_1"):
        read_requests(tmp_path)
    for name in ("forget_1.txt", "forget_3.txt"):
        written(tmp_path / name, "a")
    with pytest.raises(InputError, match="holds no forget_2"):
        read_requests(tmp_path)
    written(tmp_path / "forget_1.jsonl", '"a"')
    with pytest.raises(InputError, match=r"holds forget_1\.jsonl and forget_1\.txt: which"):
        read_requests(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        read_requests(tmp_path / "forget_1.txt")
