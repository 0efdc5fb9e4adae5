"""`gradsurgery bench`: what operators and steps cost here, beside what else does the same.

`cases` says what is timed beside what, `measuring` how, `plugin` has pytest-benchmark do it,
`record` reads what that wrote, `report`, `pictures` and `page` tell people of it.
"""
