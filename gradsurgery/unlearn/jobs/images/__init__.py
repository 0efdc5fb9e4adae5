"""The images job: a user's own images and network, and a part of the images to be unlearned."""
