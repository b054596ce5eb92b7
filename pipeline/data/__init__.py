"""Data sets, their download, and batches of images on a device."""
