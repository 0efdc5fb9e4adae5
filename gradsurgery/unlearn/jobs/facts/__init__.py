"""Unlearning made-up authors: a small language model that learns facts, offline, in minutes."""
