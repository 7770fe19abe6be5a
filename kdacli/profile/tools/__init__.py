"""Profilers around a run, and the ranges that they show."""
