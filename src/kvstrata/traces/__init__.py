"""Traces of KV traffic: readers for what others record, columns of our own, multi-tenant streams."""
