"""What methods ask of a task: its batches, losses and outputs."""
