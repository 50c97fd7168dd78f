"""Utterances on disk become batches on devices."""
