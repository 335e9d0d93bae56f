"""Command-line entry points of mega_scale."""
