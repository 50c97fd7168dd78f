"""Trained weights at work on audio without a transcript."""
