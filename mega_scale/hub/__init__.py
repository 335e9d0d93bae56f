"""Weights in other hands: Hugging Face folders, their model card and code, and the original fairseq checkpoints."""
