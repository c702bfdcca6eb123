"""What train.py stands on: images, networks, settings, checkpoints, pictures; no loss needs it."""
