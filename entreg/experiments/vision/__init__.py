"""Vision transformers: accuracy, masks and robustness under sparsity."""
