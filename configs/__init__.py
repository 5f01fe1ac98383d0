"""Presets of every stage, shipped as package data."""
