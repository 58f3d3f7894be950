"""Unlabelled data for methods that learn: rows of files, images, batches. Read calibration.py first."""
