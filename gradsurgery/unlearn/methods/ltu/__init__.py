"""Learning to Unlearn: the trainer, its meta-gradient and its membership models."""
