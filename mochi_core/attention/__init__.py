"""Attention: a table of kernels, and how the visual and text streams attend to each other."""
