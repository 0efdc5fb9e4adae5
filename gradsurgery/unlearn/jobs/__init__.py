"""Runs of many stages in a directory: what is kept there, and the search for options."""
