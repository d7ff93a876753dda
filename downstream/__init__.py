"""Evaluation and fine-tuning of backbones."""
