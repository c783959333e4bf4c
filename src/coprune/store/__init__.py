"""Stored results: keys made of contents, claims on work, notes of finished work."""
