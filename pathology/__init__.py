"""Whole-slide images to patches, features and slide labels, with a foundation model adapted to one's own slides; see README.md."""
