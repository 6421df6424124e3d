"""Advice: what a training step would take under each way of exchanging gradients, here."""
