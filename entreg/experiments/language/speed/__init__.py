"""Speed of language models, prompts and writing."""
