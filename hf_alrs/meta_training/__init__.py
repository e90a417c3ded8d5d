"""Offline training of the shipped network on a population of small tasks."""
