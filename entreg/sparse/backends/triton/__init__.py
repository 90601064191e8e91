"""Kernels of our own for causal decoders on CUDA, written in Triton; imported only where they are used."""
