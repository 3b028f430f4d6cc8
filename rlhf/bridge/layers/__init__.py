"""Torch modules that the bridge's components build."""
