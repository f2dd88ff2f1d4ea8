"""Samples: where they come from, how they are augmented, how they become workers' batches."""
