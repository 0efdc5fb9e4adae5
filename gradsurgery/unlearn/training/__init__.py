"""One protocol for all methods: their data, options, steps, and how a run continues."""
