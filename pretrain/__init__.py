"""Pretraining of video backbones without labels."""
