"""Reward models: differentiable scorers of (images, prompts), independent of the trainer."""
