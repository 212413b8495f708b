"""Criteria: each scores channels by one formula."""
