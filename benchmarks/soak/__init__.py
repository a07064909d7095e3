"""Thousands of small jobs through the real worker while everything around it goes wrong, by lot and by seed."""
