"""Noise schedule, network and DDIM."""
