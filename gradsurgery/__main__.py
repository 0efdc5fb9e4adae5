"""`python -m gradsurgery` is `gradsurgery`."""

from gradsurgery.cli import main

main()
