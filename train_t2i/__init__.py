"""Distil a text-to-image diffusion model to one to four network calls, with reward models in the loop."""

__version__ = "0.1.0"
