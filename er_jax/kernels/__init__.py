"""Kernels of attention, one module for each platform, and which of them is used."""
