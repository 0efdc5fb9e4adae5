"""The speech job: a recognizer that hears speakers unlearns one of them."""
