"""Language models: quality under sparsity."""
