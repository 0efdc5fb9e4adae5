"""Examples made of rows, with others before them, with refusals."""

import pytest

from gradsurgery.errors import InputError
from gradsurgery.language.data import REFUSALS, few_shot, from_rows, refuse

ROWS = [{"question": f"What is {k}?", "answer": f"It is {k}."} for k in range(40)]


def test_rows_are_named_by_their_place():
    with pytest.raises(InputError, match=r"^rows\[1\]: answer is empty$"):
        from_rows([ROWS[0], {"question": "a", "answer": ""}])
    assert [example.id for example in from_rows(ROWS[:2], first_id=7)] == [7, 8]


def test_questions_after_others():
    shots, (example, _) = from_rows(ROWS[5:7]), from_rows(ROWS[:2])
    found = few_shot([example], shots)[0]
    assert found.turns == (
        ("user", "What is 5?"),
        ("assistant", "It is 5."),
        ("user", "What is 6?"),
        ("assistant", "It is 6."),
        ("user", "What is 0?"),
    )
    assert (found.id, found.answer) == (example.id, example.answer)
    with pytest.raises(InputError, match="shots: example 0 is a text, not a question"):
        few_shot([example], from_rows(["a text"]))


def test_a_refusal_is_the_samples_own_whatever_the_order():
    examples = from_rows(ROWS)
    found = {each.id: each.alternate for each in refuse(examples)}
    again = {each.id: each.alternate for each in refuse(reversed(examples))}
    other = {each.id: each.alternate for each in refuse(examples, seed=1)}
    assert found == again != other
    assert len(set(found.values())) > 10
    assert set(found.values()) <= set(REFUSALS)
    # and on every machine
    assert [REFUSALS.index(found[k]) for k in range(5)] == [11, 4, 5, 23, 21]


def test_refusals_of_ones_own(tmp_path):
    path = tmp_path / "idk.txt"
    path.write_text("\ufeffNo idea.\n\n No idea. \r\n", encoding="utf-8")
    assert refuse(from_rows(ROWS[:1]), path)[0].alternate == "No idea."
    assert refuse(from_rows(ROWS[:1]), ["Pass."])[0].alternate == "Pass."
    for content, message in (("", "has no sentence"), ('{"a": 1}', "and no JSON")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            refuse(from_rows(ROWS), path)
    with pytest.raises(InputError, match="cannot read"):
        refuse(from_rows(ROWS), tmp_path)
    with pytest.raises(InputError, match=r"refusals\[1\] must be a sentence, got ' '"):
        refuse(from_rows(ROWS), ["a", " "])
    with pytest.raises(InputError, match="one sentence or more"):
        refuse(from_rows(ROWS), [])
