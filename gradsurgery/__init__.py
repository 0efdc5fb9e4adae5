"""Edit gradients per sample or per task before the optimizer sees them."""
