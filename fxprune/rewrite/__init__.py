"""Rewrite: a plan is carried out, and what came of it proved."""
