"""Ways to compute sparse attention, one module each; all agree with the reference."""
