"""Fitted models on disk: folders of safetensors and JSON."""
