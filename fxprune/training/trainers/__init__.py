"""Trainers: sessions under the training loops of other libraries."""
