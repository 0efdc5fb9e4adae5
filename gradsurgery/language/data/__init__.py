"""Data of language unlearning, from local files: text in, items with labels out.

`read` gives examples, which `few_shot` and `refuse` change, and `tokenize` or `chunks`
make items of them. transformers is not imported: tokenizers are only called.
"""

from gradsurgery.language.data.examples import Example, few_shot, from_rows
from gradsurgery.language.data.files import read, read_requests
from gradsurgery.language.data.refusals import REFUSALS, refuse
from gradsurgery.language.data.tokenized import Tags, chunks, tokenize

__all__ = [
    "REFUSALS",
    "Example",
    "Tags",
    "chunks",
    "few_shot",
    "from_rows",
    "read",
    "read_requests",
    "refuse",
    "tokenize",
]
