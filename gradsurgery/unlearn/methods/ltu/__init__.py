"""Learning to Unlearn: the trainer, its meta-gradient and its membership models."""

from gradsurgery.unlearn.methods.ltu.trainer import LTUTrainer as LTUTrainer
