"""What mkdocs.yml hooks in: links to files of the repository that are no pages lead to its host."""

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def outside(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        host = config.extra["repository"]
        return link[0] if path.startswith("docs/") else f"]({host}/blob/main/{path})"

    return re.sub(r"\]\((\.\./[\w./-]+)\)", outside, markdown)
