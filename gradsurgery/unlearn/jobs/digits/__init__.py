"""The digits job: its data and network, its stages, what it measures."""
