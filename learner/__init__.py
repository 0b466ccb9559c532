"""Turns scored groups of completions into weight updates."""
