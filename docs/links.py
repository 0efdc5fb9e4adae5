"""What mkdocs.yml hooks in: links to files of the repository that are no pages lead to its host."""

import re
from typing import Any

REPOSITORY = "https://github.com/gradsurgery/gradsurgery"


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"\]\((?:\.\./)+([\w./-]+)\)", rf"]({REPOSITORY}/blob/main/\1)", markdown)
