"""Speed and training cost of vision transformers."""
