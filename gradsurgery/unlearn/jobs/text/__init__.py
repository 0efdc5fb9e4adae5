"""The text job: samples of the user's own are unlearned from a language model that is given."""
